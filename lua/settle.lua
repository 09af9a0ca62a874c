-- Applies one numbered batch of settled attempts of a worker, once.
-- KEYS[1] services      the pool's services
-- KEYS[2] partitions    the pool's place in its history
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
-- ARGV[8…] entries      number, service ('' for an abandoned name, whose service is not known), outcome, age_ms, input,
--   output, cached, cache_creation, reasoning, cooldown_ms (how long the service asks to be left alone), first_token_us
--   (0: not known), stream_us (0: not known)
-- Returns {'applied', last, epoch, position, lost} or, changing nothing, {'gap', last}.
-- include: clock
-- include: pool
-- include: ledger

local services_key, partitions_key, holdings_key = KEYS[1], KEYS[2], KEYS[3]
local leases_key, decisions_key = KEYS[4], KEYS[5]
local is_failure = {rate_limited = 1, unauthorized = 1, overloaded = 1, failed = 1}
local is_outcome = {success = 1, rejected = 1, cancelled = 1, abandoned = 1}
-- What an outcome says of the service; all others say nothing.
local verdicts = {success = 'success', unauthorized = 'failure', overloaded = 'failure', failed = 'failure'}
local numbers = {
  'age_ms', 'input', 'output', 'cached', 'cache_creation', 'reasoning', 'cooldown_ms', 'first_token_us', 'stream_us',
}

local now_arg, seen_epoch, seen_position = to_whole(ARGV[1], 0), to_whole(ARGV[3], 0), to_whole(ARGV[4], 0)
local lease_ms, batch, skip = to_whole(ARGV[5], 1), to_whole(ARGV[6], 1), to_whole(ARGV[7], 0)
if not (now_arg and seen_epoch and seen_position and lease_ms and batch and skip and skip <= 1)
    or (#ARGV - 7) % 12 ~= 0 then
  return redis.error_reply('BALANCER settle: malformed argument')
end
local entries = {}
for at = 8, #ARGV, 12 do
  local entry = {number = ARGV[at], service = ARGV[at + 1], outcome = ARGV[at + 2]}
  for i, name in ipairs(numbers) do
    entry[name] = to_whole(ARGV[at + 2 + i], 0)
    if not entry[name] then return redis.error_reply('BALANCER settle: malformed ' .. name) end
  end
  local is_known = is_outcome[entry.outcome] or is_failure[entry.outcome]
  if not (is_known and to_whole(entry.number, 0) and (entry.service ~= '' or entry.outcome == 'abandoned')) then
    return redis.error_reply('BALANCER settle: malformed entry')
  end
  entries[#entries + 1] = entry
end

local last = tonumber(redis.call('HGET', holdings_key, 'last') or 0)
if batch > last + 1 and skip == 0 then return {'gap', last} end
local now = clock(now_arg)
local pool = open_pool(partitions_key, decisions_key, seen_epoch, seen_position, now)
redis.call('ZADD', leases_key, whole(now + lease_ms), ARGV[2])

local services, meters, providers = {}, {}, {}

-- An attempt that was never sent: what it held is given back, or its name is remembered for 60 s.
local function abandon(entry, service)
  if service then
    service.abandoned = service.abandoned + 1
    service.is_changed = true
  else
    redis.call('HSET', holdings_key, entry.number, 'x ' .. whole(now + 60000))
  end
end

local function count(entry, service)
  service.requests = service.requests + 1
  if is_failure[entry.outcome] then service.failures = service.failures + 1 end
  for _, name in ipairs({'input', 'output', 'cached', 'cache_creation', 'reasoning'}) do
    service[name] = service[name] + entry[name]
  end
  service.last_used = math.max(service.last_used, now - entry.age_ms)
  service.is_changed = true
  add_window_tokens(service, entry.input, entry.output, now, entry.age_ms)
  if entry.cooldown_ms > 0 then
    service.cooldown = math.max(service.cooldown, now - entry.age_ms + entry.cooldown_ms)
  end
  if entry.outcome == 'success' and entry.age_ms == 0 then
    add_latency(service, entry.first_token_us, entry.stream_us, entry.output, now)
  end
end

-- What a minute counts of an attempt: what was reported; of one that was served and reported nothing, as when its
-- client left, what it had reserved. Otherwise such clients would have no limit.
local function minute_tokens(entry, holding)
  local tokens = entry.input + entry.output
  local is_served = entry.outcome == 'success' or entry.outcome == 'cancelled'
  return tokens == 0 and is_served and holding.reserved or tokens
end

-- Applies the entry at a place of the batch. A holding is one of `ledger`'s, `x until_ms`, or
-- `l reserved reaped_ms position id`.
local function apply(entry, place)
  local text = redis.call('HGET', holdings_key, entry.number) or ''
  local holding = read_holding(text)
  local lost_reserved, reaped_ms, position, lost_id = string.match(text, '^l (%d+) (%d+) (%d+) (.+)$')
  local id = holding and holding.id or lost_id or entry.service
  local service = id ~= '' and load_service(services, services_key, id, ledger_fields) or nil
  local before = advance(pool) and (service and event_text(service) or '')
  local meter
  if holding then
    meter = holding.meters_provider and load_service(meters, services_key, provider_of(id), meter_fields) or nil
    release(service, meter, holding)
  elseif lost_reserved then
    uncount_lost(service, tonumber(lost_reserved), tonumber(reaped_ms), tonumber(position))
  end
  if holding or lost_reserved then redis.call('HDEL', holdings_key, entry.number) end
  if entry.outcome == 'abandoned' then
    abandon(entry, service)
  else
    count(entry, service)
    if holding and entry.age_ms < 60000 then
      add_minute_tokens(service, meter, holding, minute_tokens(entry, holding), now)
    end
  end
  if service and not lost_reserved then
    local provider = provider_numbers(providers, service)
    local verdict = entry.age_ms == 0 and verdicts[entry.outcome] or ''
    local probe = holding and holding.probe or 0
    set_breaker(pool, service, id, breaker_after(service.breaker, provider, verdict, now, pool.position, probe))
  end
  if before then
    record_event(pool, 'settle', {
      'worker', ARGV[2], 'number', entry.number, 'batch', whole(batch), 'place', place, 'service', id,
      'outcome', entry.outcome, 'age_ms', whole(entry.age_ms), 'input', whole(entry.input),
      'output', whole(entry.output), 'cached', whole(entry.cached), 'cache_creation', whole(entry.cache_creation),
      'reasoning', whole(entry.reasoning), 'cooldown_ms', whole(entry.cooldown_ms),
      'first_token_us', whole(entry.first_token_us), 'stream_us', whole(entry.stream_us), 'before', before,
      'after', service and event_text(service) or '',
    })
  end
end

if batch > last then
  for place, entry in ipairs(entries) do apply(entry, place) end
  last = batch
  redis.call('HSET', holdings_key, 'last', whole(last))
  save_services(services, services_key, ledger_fields)
  save_services(meters, services_key, meter_fields)
end
close_pool(pool, partitions_key, {services_key, leases_key, decisions_key}, holdings_key)
return {'applied', last, pool.epoch, pool.position, pool.lost}
