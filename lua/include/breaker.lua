-- include: number

-- A service's breaker, text `state consecutive start requests failed opens successes until probe`, '' for one that has
-- seen nothing. State 0 is closed, 1 open; it is half-open once `until` has passed. `probe` is the position of the pick
-- that tries it, 0 for none.
local BREAKER_FIELDS = {
  'state', 'consecutive', 'start', 'requests', 'failed', 'opens', 'successes', 'until_ms', 'probe',
}

local function read_breaker(text)
  local breaker, values = {}, string.gmatch(text, '%d+')
  for _, name in ipairs(BREAKER_FIELDS) do breaker[name] = tonumber(values() or 0) end
  return breaker
end

local function breaker_text(breaker)
  local values, sum = {}, 0
  for i, name in ipairs(BREAKER_FIELDS) do
    values[i] = whole(breaker[name])
    sum = sum + breaker[name]
  end
  return sum > 0 and table.concat(values, ' ') or ''
end

local function has_breaker(provider)
  return provider and (provider.failures > 0 or provider.ratio_permille > 0)
end

-- True for the text of a breaker that is not closed.
local function is_open(text)
  return string.sub(text, 1, 1) == '1'
end

-- True for one that is half-open, and nobody tries it.
local function is_due(breaker, now)
  return breaker.state == 1 and breaker.until_ms <= now and breaker.probe == 0
end

-- Open for a while, twice as long each time in a row up to eight times, and up to a fifth longer: so that services that
-- broke at once are not tried at once. The position is the dice.
local function open_breaker(breaker, provider, now, position)
  local opens = breaker.opens + 1
  local duration = provider.open_ms * math.min(2 ^ (opens - 1), 8)
  local jitter = math.floor(duration * ((position * 7919) % 1000) / 5000)
  for _, name in ipairs(BREAKER_FIELDS) do breaker[name] = 0 end
  breaker.state, breaker.opens, breaker.until_ms = 1, opens, now + duration + jitter
end

local function count_failure(breaker, provider, now, position)
  breaker.consecutive = breaker.consecutive + 1
  local ratio = provider.ratio_permille
  if (provider.failures > 0 and breaker.consecutive >= provider.failures)
      or (ratio > 0 and breaker.requests >= provider.min_requests and breaker.failed * 1000 >= ratio * breaker.requests)
  then
    open_breaker(breaker, provider, now, position)
  end
end

-- A probe that succeeded, or a sign of life: enough of them close the breaker.
local function count_success(breaker, provider)
  breaker.successes = breaker.successes + 1
  return breaker.successes >= provider.successes and '' or breaker_text(breaker)
end

-- The breaker's text after an attempt. `verdict` is 'success', 'failure' or '' for what says nothing of the service;
-- `probe` the position of the pick if it was a probe, else 0.
local function breaker_after(text, provider, verdict, now, position, probe)
  if not has_breaker(provider) and verdict ~= '' then return '' end
  if text == '' and verdict == '' then return text end
  local breaker = read_breaker(text)
  if breaker.state == 1 then
    if probe == 0 or breaker.probe ~= probe then return text end
    breaker.probe = 0
    if verdict == 'success' then return count_success(breaker, provider) end
    if verdict == 'failure' then open_breaker(breaker, provider, now, position) end
    return breaker_text(breaker)
  end
  if verdict == '' then return text end
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
  return breaker_text(breaker)
end

-- Gives a service another breaker, and keeps the pool's list of those that are not closed: `until id` by line.
local function set_breaker(pool, service, id, text)
  local was_open, opens = is_open(service.breaker), is_open(text)
  if text ~= service.breaker then service.breaker, service.is_changed = text, true end
  if not (was_open or opens) then return end
  local until_of, ids, lines = {}, {}, {}
  for until_ms, other in string.gmatch(pool.broken, '(%d+) ([^\n]+)\n') do until_of[other] = until_ms end
  until_of[id] = opens and whole(read_breaker(text).until_ms) or nil
  for other in pairs(until_of) do ids[#ids + 1] = other end
  table.sort(ids, is_before)
  for i, other in ipairs(ids) do lines[i] = until_of[other] .. ' ' .. other .. '\n' end
  pool.broken = table.concat(lines)
  pool.is_broken_changed = true
end
