-- Notes whether a provider has answered when it was asked for its health, on the breakers of its services.
-- KEYS[1] services      the pool's services
-- KEYS[2] partitions    the pool's place in its history
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
local pool = open_pool(partitions_key, decisions_key, seen_epoch, seen_position, now)
local services, providers = {}, {}

local function breaker_noted(text, provider)
  local breaker = read_breaker(text)
  if not has_breaker(provider) or (breaker.state == 1 and not is_due(breaker, now)) then return text end
  if is_alive then return breaker.state == 1 and count_success(breaker, provider) or text end
  if breaker.state == 1 then
    open_breaker(breaker, provider, now, pool.position)
  else
    breaker.consecutive = breaker.consecutive + 1
    if provider.failures > 0 and breaker.consecutive >= provider.failures then
      open_breaker(breaker, provider, now, pool.position)
    end
  end
  return breaker_text(breaker)
end

for at = 5, #ARGV do
  local id = ARGV[at]
  local service = load_service(services, services_key, id, ledger_fields)
  local provider = provider_numbers(providers, service)
  advance(pool)
  local before = event_text(service)
  set_breaker(pool, service, id, breaker_noted(service.breaker, provider))
  record_event(pool, 'health', {
    'service', id, 'is_alive', ARGV[4], 'before', before, 'after', event_text(service),
  })
end
save_services(services, services_key, ledger_fields)
close_pool(pool, partitions_key, {services_key, decisions_key}, nil)
return {'noted', #ARGV - 4, pool.epoch, pool.position, pool.lost}
