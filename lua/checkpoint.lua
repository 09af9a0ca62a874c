-- A picture of a pool's whole state at one moment, which it also writes to the decision stream, if events are recorded.
-- KEYS[1] services      the pool's services, and its place in its history
-- KEYS[2] partitions    the pool's rules and partitions
-- KEYS[3] leases        of all workers
-- KEYS[4] decisions     the stream of events
-- KEYS[5…] holdings     of the workers, in the order of ARGV
-- ARGV[1] now_ms        0 for the server's clock
-- ARGV[2…] workers      all that are listed in leases
-- Returns {'checkpoint', epoch, position, now_ms, state}, the state as JSON: {services, partitions, leases, holdings:
--   {worker: …}}, each a flat array of fields and values; or {'again'}: another worker is listed by now.
-- include: clock
-- include: pool

local services_key, partitions_key, leases_key, decisions_key = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local now_arg = to_whole(ARGV[1], 0)
if not now_arg or #KEYS - 4 ~= #ARGV - 1 then return redis.error_reply('BALANCER checkpoint: malformed argument') end

local named, holdings = {}, {}
for i = 2, #ARGV do
  named[ARGV[i]] = true
  holdings[i - 1] = {ARGV[i], redis.call('HGETALL', KEYS[3 + i])}
end
local leases = redis.call('ZRANGE', leases_key, 0, -1, 'WITHSCORES')
for i = 1, #leases, 2 do
  if not named[leases[i]] then return {'again'} end
end

local now = clock(now_arg)
local pool = open_pool(redis.call('HMGET', services_key, unpack(place_fields())), decisions_key, 0, 0, now)
local state = cjson.encode({
  services = redis.call('HGETALL', services_key), partitions = redis.call('HGETALL', partitions_key), leases = leases,
  holdings = holdings,
})
record_event(pool, 'checkpoint', {'state', state})
redis.call('PEXPIRE', decisions_key, 2592000000)
return {'checkpoint', pool.epoch, pool.position, now, state}
