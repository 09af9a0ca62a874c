-- Renews the asking worker's lease and counts as lost what one worker (itself or another) can no longer settle in time:
-- everything if its lease has ended, else the holdings past their own deadline. A call looks at some of the holdings
-- and tells where the next one goes on, so that many of them hold up nobody for long.
-- KEYS[1] services      the pool's services, and its place in its history
-- KEYS[2] partitions    the pool's rules and partitions
-- KEYS[3] holdings      of the worker that is looked at
-- KEYS[4] leases        of all workers
-- KEYS[5] decisions     the stream of events
-- ARGV[1] now_ms        0 for the server's clock
-- ARGV[2] worker        who asks
-- ARGV[3] epoch         the highest epoch and
-- ARGV[4] position      position in it that the worker has seen, 0 0 for none
-- ARGV[5] lease_ms      how long the asking worker's lease is renewed for
-- ARGV[6] target        the worker that is looked at
-- ARGV[7] limit         holdings to reap at most
-- ARGV[8] place         where to go on: what the last call has returned, '' to begin
-- Returns {'reaped', is_ended, lost, epoch, position, lost_positions, place}: is_ended tells whether the target's lease
--   had ended, lost how many attempts were counted as lost; place is '' once all holdings were looked at.
-- include: clock
-- include: pool
-- include: ledger

local services_key, partitions_key, holdings_key = KEYS[1], KEYS[2], KEYS[3]
local leases_key, decisions_key = KEYS[4], KEYS[5]
-- Holdings that a call looks at, or a few more: fewer than a worker lets it reap, so that it reads them once.
local LOOKED_AT = 400

local now_arg, seen_epoch, seen_position = to_whole(ARGV[1], 0), to_whole(ARGV[3], 0), to_whole(ARGV[4], 0)
local lease_ms, limit = to_whole(ARGV[5], 1), to_whole(ARGV[7], 1)
local cursor, of_lease = string.match(ARGV[8], '^(%d+) (-?%d+)$')
if not (now_arg and seen_epoch and seen_position and lease_ms and limit and (cursor or ARGV[8] == '')) then
  return redis.error_reply('BALANCER reap: malformed argument')
end
local worker, target = ARGV[2], ARGV[6]

local now = clock(now_arg)
local state = open_services(services_key, true)
local pool = open_pool(load_services(state, {}, place_fields()), decisions_key, seen_epoch, seen_position, now)
redis.call('ZADD', leases_key, whole(now + lease_ms), worker)
local lease_end = tonumber(redis.call('ZSCORE', leases_key, target) or 0)
local is_ended = lease_end <= now
-- All of an ended lease must be seen under that lease: what came after a look, another may have picked since.
if not cursor or (is_ended and of_lease ~= whole(lease_end)) then cursor = '0' end
local lost = 0

local function reap(number, holding)
  local id = holding.id
  local service = load_service(state, id)
  advance(pool)
  local before = event_text(service)
  count_lost(service, holding, now)
  settle_breaker(pool, service, id, false, '', holding.probe)
  redis.call('HSET', holdings_key, number,
    'l ' .. whole(holding.reserved) .. ' ' .. whole(now) .. ' ' .. whole(pool.position) .. ' ' .. id)
  lost = lost + 1
  record_event(pool, 'reap', {
    'worker', target, 'number', number, 'service', id, 'reserved', whole(holding.reserved), 'by', worker,
    'before', before, 'after', event_text(service),
  })
end

local following, flat = unpack(redis.call('HSCAN', holdings_key, cursor, 'COUNT', LOOKED_AT))
local numbers, values = {}, {}
for i = 1, #flat, 2 do
  local number = tonumber(flat[i])
  if number and not values[number] then  -- A table that is growing may give one twice; `last` is none.
    numbers[#numbers + 1], values[number] = number, flat[i + 1]
  end
end
table.sort(numbers)
for _, number in ipairs(numbers) do
  local value = values[number]
  local until_ms = string.match(value, '^x (%d+)$')
  if until_ms then
    if tonumber(until_ms) <= now then redis.call('HDEL', holdings_key, whole(number)) end
  elseif lost < limit then
    local holding = read_holding(value)
    if holding and (is_ended or holding.deadline <= now) then reap(whole(number), holding) end
  end
end
local place = ''
if lost == limit then
  place = cursor .. ' ' .. whole(lease_end)  -- Some of these may be left.
elseif following ~= '0' then
  place = following .. ' ' .. whole(lease_end)
elseif is_ended and lease_end >= 0 then
  -- A worker that is reaped stays listed for as long as its holdings are kept, with the time of that below zero.
  redis.call('ZADD', leases_key, '-' .. whole(now), target)
end
redis.call('ZREMRANGEBYSCORE', leases_key, '-' .. whole(math.max(0, now - 604800000)), 0)
close_pool(pool, services_key, changed_fields(state), partitions_key, leases_key, true)
if worker == target then redis.call('PEXPIRE', holdings_key, HOLDINGS_LIVE_MS) end
return {'reaped', is_ended and 1 or 0, lost, pool.epoch, pool.position, pool.lost, place}
