-- Applies one numbered batch of settled attempts of a worker, once.
-- KEYS[1] services      the pool's services, and its place in its history
-- KEYS[2] partitions    the pool's rules and partitions
-- KEYS[3] holdings      of the worker
-- KEYS[4] leases        of all workers
-- KEYS[5] decisions     the stream of events
-- ARGV[1] now_ms        0 for the server's clock
-- ARGV[2] worker        whose batch it is
-- ARGV[3] epoch         the highest epoch and
-- ARGV[4] position      position in it that the worker has seen, 0 0 for none
-- ARGV[5] lease_ms      how long the worker's lease is renewed for
-- ARGV[6] batch         1, 2, 3… for this worker and pool
-- ARGV[7] skip          1 when earlier batches are no longer held by the worker and must be passed over
-- ARGV[8…] entries      numbers, service ('' for an abandoned name, whose service is not known); the numbers, joined by
--   blanks, are `number outcome age_ms input output cached cache_creation reasoning cooldown_ms first_token_us
--   stream_us`: how long the service asks to be left alone, and how fast it was, 0 for not known
-- Returns {'applied', last, epoch, position, lost} or, changing nothing, {'gap', last}.
-- include: clock
-- include: pool
-- include: ledger

local services_key, partitions_key, holdings_key = KEYS[1], KEYS[2], KEYS[3]
local leases_key, decisions_key = KEYS[4], KEYS[5]
local is_failure = {rate_limited = true, unauthorized = true, overloaded = true, failed = true}
local is_other = {success = true, rejected = true, cancelled = true, abandoned = true}
-- What an outcome says of the service; all others say nothing.
local verdicts = {success = 'success', unauthorized = 'failure', overloaded = 'failure', failed = 'failure'}
local NUMBERS = '^(%d+) ([%l_]+) (%d+) (%d+) (%d+) (%d+) (%d+) (%d+) (%d+) (%d+) (%d+)$'

-- The entry out of its arguments, nil when they are malformed.
local function read_entry(text, service)
  local number, outcome, age_ms, input, output, cached, cache_creation, reasoning, cooldown_ms, first_token_us,
    stream_us = string.match(text, NUMBERS)
  if not number or not (is_other[outcome] or is_failure[outcome]) then return nil end
  age_ms, input, output, cached, cache_creation = age_ms + 0, input + 0, output + 0, cached + 0, cache_creation + 0
  reasoning, cooldown_ms, first_token_us = reasoning + 0, cooldown_ms + 0, first_token_us + 0
  stream_us = stream_us + 0
  local largest = math.max(number, age_ms, input, output, cached, cache_creation, reasoning, cooldown_ms,
    first_token_us, stream_us)
  local has_spelling = string.byte(number) ~= 48 or number == '0'
  if largest > MOST_WHOLE or not has_spelling or (service == '' and outcome ~= 'abandoned') then return nil end
  return {
    number = number, service = service, outcome = outcome, age_ms = age_ms, input = input, output = output,
    cached = cached, cache_creation = cache_creation, reasoning = reasoning, cooldown_ms = cooldown_ms,
    first_token_us = first_token_us, stream_us = stream_us, holding = false,
  }
end

local now_arg, seen_epoch, seen_position = to_whole(ARGV[1], 0), to_whole(ARGV[3], 0), to_whole(ARGV[4], 0)
local lease_ms, batch, skip = to_whole(ARGV[5], 1), to_whole(ARGV[6], 1), to_whole(ARGV[7], 0)
if not (now_arg and seen_epoch and seen_position and lease_ms and batch and skip and skip <= 1)
    or (#ARGV - 7) % 2 ~= 0 then
  return redis.error_reply('BALANCER settle: malformed argument')
end
local entries, names = {}, {'last'}
for at = 8, #ARGV, 2 do
  local entry, count = read_entry(ARGV[at], ARGV[at + 1]), #entries + 1
  if not entry then return redis.error_reply('BALANCER settle: entry ' .. count .. ' is malformed') end
  entries[count], names[count + 1] = entry, entry.number
end

local known = redis.call('HMGET', holdings_key, unpack(names))
local last, renewed = string.match(known[1] or '0 0', '^(%d+) +(%d+)$')
last, renewed = last + 0, renewed + 0
if batch > last + 1 and skip == 0 then return {'gap', last} end

local is_next = batch > last
local now = clock(now_arg)
local gone, noted, ids = {}, {}, {}
local state = open_services(services_key, true)

-- What each name holds, and the services to be read. A name that comes twice holds it once.
if is_next then
  local seen = {}
  for i, entry in ipairs(entries) do
    local number, text = entry.number, known[i + 1]
    if text and not seen[number] then entry.holding = read_holding(text) or read_lost(text) or false end
    seen[number] = true
    local id = entry.holding and entry.holding.id or entry.service
    if id ~= '' then ids[#ids + 1] = id end
  end
end
local pool = open_pool(load_services(state, ids, place_fields()), decisions_key, seen_epoch, seen_position, now)

-- An attempt that was never sent: what it held is given back, or its name is remembered for 60 s.
local function abandon(entry, service)
  if service then
    service.abandoned = service.abandoned + 1
    service.is_changed = true
  else
    noted[#noted + 1] = entry.number
    noted[#noted + 1] = string.format('x %d', now + 60000)
  end
end

local function count(entry, service)
  local age_ms, input, output = entry.age_ms, entry.input, entry.output
  service.requests = service.requests + 1
  if is_failure[entry.outcome] then service.failures = service.failures + 1 end
  service.input, service.output = service.input + input, service.output + output
  service.cached = service.cached + entry.cached
  service.cache_creation = service.cache_creation + entry.cache_creation
  service.reasoning = service.reasoning + entry.reasoning
  if now - age_ms > service.last_used then service.last_used = now - age_ms end
  service.is_changed = true
  add_window_tokens(service, input, output, now, age_ms)
  if entry.cooldown_ms > 0 then
    service.cooldown = math.max(service.cooldown, now - age_ms + entry.cooldown_ms)
  end
  if entry.outcome == 'success' and age_ms == 0 then
    add_latency(service, entry.first_token_us, entry.stream_us, output, now)
  end
end

-- What a minute counts of an attempt: what was reported; of one that was served and reported nothing, as when its
-- client left, what it had reserved. Otherwise such clients would have no limit.
local function minute_tokens(entry, holding)
  local tokens = entry.input + entry.output
  local is_served = entry.outcome == 'success' or entry.outcome == 'cancelled'
  return tokens == 0 and is_served and holding.reserved or tokens
end

local function record_settle(entry, place, id, before, service)
  record_event(pool, 'settle', {
    'worker', ARGV[2], 'number', entry.number, 'batch', whole(batch), 'place', place, 'service', id,
    'outcome', entry.outcome, 'age_ms', whole(entry.age_ms), 'input', whole(entry.input),
    'output', whole(entry.output), 'cached', whole(entry.cached), 'cache_creation', whole(entry.cache_creation),
    'reasoning', whole(entry.reasoning), 'cooldown_ms', whole(entry.cooldown_ms),
    'first_token_us', whole(entry.first_token_us), 'stream_us', whole(entry.stream_us), 'before', before,
    'after', service and event_text(service) or '',
  })
end

-- Applies the entry at a place of the batch.
local function apply(entry, place)
  local holding = entry.holding
  local id = holding and holding.id or entry.service
  local service = id ~= '' and (state.services[id] or load_service(state, id)) or nil
  local before = advance(pool) and (service and event_text(service) or '')
  local is_lost = holding and holding.is_lost
  if holding then
    gone[#gone + 1] = entry.number
    if is_lost then uncount_lost(service, holding) else release(service, holding) end
  end
  if entry.outcome == 'abandoned' then
    abandon(entry, service)
  else
    count(entry, service)
    if holding and not is_lost and entry.age_ms < 60000 then
      add_minute_tokens(service, holding, minute_tokens(entry, holding), now)
    end
  end
  if service and not is_lost then
    local verdict = entry.age_ms == 0 and verdicts[entry.outcome] or ''
    settle_breaker(pool, service, id, provider_numbers(service), verdict, holding and holding.probe or 0)
  end
  if before then record_settle(entry, place, id, before, service) end
end

-- First of all what takes memory, so that a server that has none refuses all of it.
local is_new = redis.call('ZADD', leases_key, whole(now + lease_ms), ARGV[2]) > 0
local renews = is_stale(renewed, now)
if is_next then
  for place, entry in ipairs(entries) do apply(entry, place) end
  last = batch
  noted[#noted + 1] = 'last'
  noted[#noted + 1] = string.format(LONG_LAST, last, renews and now or renewed)
  if #gone > 0 then redis.call('HDEL', holdings_key, unpack(gone)) end
  redis.call('HSET', holdings_key, unpack(noted))
end
if renews then redis.call('PEXPIRE', holdings_key, HOLDINGS_LIVE_MS) end
close_pool(pool, services_key, changed_fields(state), {partitions_key, leases_key}, is_new)
return {'applied', last, pool.epoch, pool.position, pool.lost}
