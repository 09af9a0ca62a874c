-- include: number

-- A service's breaker, text `state consecutive start requests failed opens successes until probe`, '' for one that has
-- seen nothing. State 0 is closed, 1 open; it is half-open once `until` has passed. `probe` is the position of the pick
-- that tries it, 0 for none. A service has `breaker_text`, and `breaker` once somebody has looked into it.
local BREAKER = '^(%d+) (%d+) (%d+) (%d+) (%d+) (%d+) (%d+) (%d+) (%d+)$'

local function clear_breaker(breaker) -- apart: rare
  breaker.state, breaker.consecutive, breaker.start, breaker.requests, breaker.failed = 0, 0, 0, 0, 0
  breaker.opens, breaker.successes, breaker.until_ms, breaker.probe = 0, 0, 0, 0
end

local function breaker_of(service)
  local breaker = service.breaker
  if breaker then return breaker end
  breaker = {
    state = 0, consecutive = 0, start = 0, requests = 0, failed = 0, opens = 0, successes = 0, until_ms = 0, probe = 0,
  }
  local state, consecutive, start, requests, failed, opens, successes, until_ms, probe =
    string.match(service.breaker_text, BREAKER)
  if state then
    breaker.state, breaker.consecutive, breaker.start = state + 0, consecutive + 0, start + 0
    breaker.requests = requests + 0
    breaker.failed, breaker.opens, breaker.successes = failed + 0, opens + 0, successes + 0
    breaker.until_ms, breaker.probe = until_ms + 0, probe + 0
  end
  service.breaker = breaker
  return breaker
end

local function has_breaker(provider)
  return provider and (provider.failures > 0 or provider.ratio_permille > 0)
end

-- True for one that is not closed.
local function is_open(service)
  local breaker = service.breaker
  if breaker then return breaker.state == 1 end
  return string.byte(service.breaker_text) == 49
end

-- True for one that is half-open, and nobody tries it.
local function is_due(breaker, now) -- apart: rare
  return breaker.state == 1 and breaker.until_ms <= now and breaker.probe == 0
end

-- Open for a while, twice as long each time in a row up to eight times, and up to a fifth longer: so that services that
-- broke at once are not tried at once. The position is the dice.
local function open_breaker(breaker, provider, now, position) -- apart: rare
  local opens = breaker.opens + 1
  local duration = provider.open_ms * math.min(2 ^ (opens - 1), 8)
  local jitter = math.floor(duration * ((position * 7919) % 1000) / 5000)
  clear_breaker(breaker)
  breaker.state, breaker.opens, breaker.until_ms = 1, opens, now + duration + jitter
end

local function count_failure(breaker, provider, now, position) -- apart: rare
  breaker.consecutive = breaker.consecutive + 1
  local ratio = provider.ratio_permille
  if (provider.failures > 0 and breaker.consecutive >= provider.failures)
      or (ratio > 0 and breaker.requests >= provider.min_requests and breaker.failed * 1000 >= ratio * breaker.requests)
  then
    open_breaker(breaker, provider, now, position)
  end
end

-- A probe that succeeded, or a sign of life: enough of them close the breaker.
local function count_success(breaker, provider) -- apart: rare
  breaker.successes = breaker.successes + 1
  if breaker.successes >= provider.successes then clear_breaker(breaker) end
end

-- Counts the end of an attempt. `verdict` is 'success', 'failure' or '' for what says nothing of the service; `probe`
-- the position of the pick if it was a probe, else 0.
local function count_verdict(breaker, provider, verdict, now, position, probe)
  if not has_breaker(provider) and verdict ~= '' then return clear_breaker(breaker) end
  if breaker.state == 1 then
    if probe == 0 or breaker.probe ~= probe then return end
    breaker.probe = 0
    if verdict == 'success' then count_success(breaker, provider) end
    if verdict == 'failure' then open_breaker(breaker, provider, now, position) end
    return
  end
  if verdict == '' then return end
  if now - breaker.start >= provider.window_ms or breaker.start > now then
    breaker.start, breaker.requests, breaker.failed = now, 0, 0
  end
  breaker.requests = breaker.requests + 1
  if verdict == 'success' then
    breaker.consecutive = 0
  else
    breaker.failed = breaker.failed + 1
    count_failure(breaker, provider, now, position)
  end
end

-- Keeps the pool's list of breakers that are not closed, `until id` by line, once a service's opens, changes or closes.
local function list_breaker(pool, service, id) -- apart: rare
  local until_of, ids, lines = {}, {}, {}
  for until_ms, other in string.gmatch(pool.broken, '(%d+) ([^\n]+)\n') do until_of[other] = until_ms end
  until_of[id] = is_open(service) and whole(breaker_of(service).until_ms) or nil
  for other in pairs(until_of) do ids[#ids + 1] = other end
  table.sort(ids, is_before)
  for i, other in ipairs(ids) do lines[i] = until_of[other] .. ' ' .. other .. '\n' end
  pool.broken = table.concat(lines)
  pool.is_broken_changed = true
end

-- Counts the end of an attempt on the service's breaker.
local function settle_breaker(pool, service, id, provider, verdict, probe)
  if service.breaker_text == '' and not service.breaker and (verdict == '' or not has_breaker(provider)) then return end
  local was_open = is_open(service)
  count_verdict(breaker_of(service), provider, verdict, pool.now, pool.position, probe)
  service.is_changed = true
  if was_open or is_open(service) then list_breaker(pool, service, id) end
end
