-- Gives a lease back that has brought no new tokens.
-- KEYS[1] grant         the provider's grant
-- KEYS[2] grants        provider's uuid to how often its grant has changed
-- ARGV[1] now_ms        0 for the server's clock
-- ARGV[2] provider      its uuid
-- ARGV[3] fence         of the lease
-- ARGV[4] state         `ready`, `lost` or `in_doubt`
-- ARGV[5] pause_ms      nobody asks again before that is over
-- ARGV[6] fault         why, in our words
-- Returns {'released', fence} or {'fenced', fence}: another lease was given since, or what came of this one is known.
-- include: clock
-- include: grant

local now_arg, fence, pause_ms = to_whole(ARGV[1], 0), to_whole(ARGV[3], 1), to_whole(ARGV[5], 0)
if not (now_arg and fence and pause_ms) or (ARGV[4] ~= 'ready' and ARGV[4] ~= 'lost' and ARGV[4] ~= 'in_doubt') then
  return redis.error_reply('BALANCER grant_release: malformed argument')
end
local head = redis.call('HMGET', KEYS[1], 'fence', 'state')
local last = tonumber(head[1] or 0)
if last ~= fence or (head[2] ~= 'asking' and head[2] ~= 'in_doubt') then return { 'fenced', last } end
redis.call('HINCRBY', KEYS[1], 'failures', 1)
redis.call('HSET', KEYS[1], 'state', ARGV[4], 'again_ms', whole(clock(now_arg) + pause_ms), 'lease_until_ms', '0',
  'fault', ARGV[6], 'holder', '')
announce(KEYS[1], KEYS[2], ARGV[2])
return { 'released', fence }
