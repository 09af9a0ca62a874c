-- Notes whether a provider has answered when it was asked for its health, on the breakers of its services.
-- KEYS[1] services      the pool's services, and its place in its history
-- KEYS[2] partitions    the pool's rules and partitions
-- KEYS[3] decisions     the stream of events
-- ARGV[1] now_ms        0 for the server's clock
-- ARGV[2] epoch         the highest epoch and
-- ARGV[3] position      position in it that the caller has seen, 0 0 for none
-- ARGV[4] is_alive      1 if it has answered, 0 if not
-- ARGV[5…] services     their ids
-- Returns {'noted', how many, epoch, position, lost}.
-- include: clock
-- include: pool
-- include: ledger

local services_key, partitions_key, decisions_key = KEYS[1], KEYS[2], KEYS[3]
local now_arg, seen_epoch, seen_position = to_whole(ARGV[1], 0), to_whole(ARGV[2], 0), to_whole(ARGV[3], 0)
local is_alive = ARGV[4] == '1'
if not (now_arg and seen_epoch and seen_position and (is_alive or ARGV[4] == '0')) then
  return redis.error_reply('BALANCER health: malformed argument')
end
for at = 5, #ARGV do
  if ARGV[at] == '' then return redis.error_reply('BALANCER health: a service without an id') end
end

local now = clock(now_arg)
local state = open_services(services_key, true)
local pool = open_pool(load_services(state, {}, place_fields()), decisions_key, seen_epoch, seen_position, now)

local function note(breaker, provider)
  if not has_breaker(provider) or (breaker.state == 1 and not is_due(breaker, now)) then return end
  if is_alive then
    if breaker.state == 1 then count_success(breaker, provider) end
  elseif breaker.state == 1 then
    open_breaker(breaker, provider, now, pool.position)
  else
    breaker.consecutive = breaker.consecutive + 1
    if provider.failures > 0 and breaker.consecutive >= provider.failures then
      open_breaker(breaker, provider, now, pool.position)
    end
  end
end

for at = 5, #ARGV do
  local id = ARGV[at]
  local service = load_service(state, id)
  local was_open = is_open(service)
  advance(pool)
  local before = event_text(service)
  note(breaker_of(service), provider_numbers(service))
  service.is_changed = true
  if was_open or is_open(service) then list_breaker(pool, service, id) end
  record_event(pool, 'health', {
    'service', id, 'is_alive', ARGV[4], 'before', before, 'after', event_text(service),
  })
end
close_pool(pool, services_key, changed_fields(state), partitions_key, nil, true)
return {'noted', #ARGV - 4, pool.epoch, pool.position, pool.lost}
