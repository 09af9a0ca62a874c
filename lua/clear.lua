-- Sets the counters of services back to zero: totals and windows, not what is in flight or reserved.
-- KEYS[1] services      the pool's services, and its place in its history
-- KEYS[2] partitions    the pool's rules and partitions
-- KEYS[3] decisions     the stream of events
-- ARGV[1] now_ms        0 for the server's clock
-- ARGV[2] epoch         the highest epoch and
-- ARGV[3] position      position in it that the caller has seen, 0 0 for none
-- ARGV[4…] services     their ids
-- Returns {'cleared', how many, epoch, position, lost}.
-- include: clock
-- include: pool
-- include: ledger

local services_key, partitions_key, decisions_key = KEYS[1], KEYS[2], KEYS[3]
local now_arg, seen_epoch, seen_position = to_whole(ARGV[1], 0), to_whole(ARGV[2], 0), to_whole(ARGV[3], 0)
if not (now_arg and seen_epoch and seen_position) then
  return redis.error_reply('BALANCER clear: malformed argument')
end

local now = clock(now_arg)
local state = open_services(services_key, true)
local pool = open_pool(load_services(state, {}, place_fields()), decisions_key, seen_epoch, seen_position, now)
-- A service as the event tells it: `in_flight reserved picks`, the totals, and
-- `cooldown first_token per_token measured`.
local function cleared_text(service)
  return with_texts(service, string.format('%d %d %d ', service.in_flight, service.reserved, service.picks)
    .. totals_text(service.totals) .. string.format(' %d %d %d %d', service.cooldown, service.first_token,
    service.per_token, service.measured))
end

for at = 4, #ARGV do
  local id = ARGV[at]
  local service = load_service(state, id)
  advance(pool)
  local before = cleared_text(service)
  service.picks = 0
  for i = 1, #service.totals do service.totals[i] = 0 end
  for _, w in ipairs(service.windows) do w.start, w.requests, w.tokens, w.output = 0, 0, 0, 0 end
  service.totals[CLEARED] = pool.position
  service.is_changed = true
  record_event(pool, 'clear', {'service', id, 'before', before, 'after', cleared_text(service)})
end
close_pool(pool, services_key, changed_fields(state), partitions_key, nil, true)
return {'cleared', #ARGV - 3, pool.epoch, pool.position, pool.lost}
