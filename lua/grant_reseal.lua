-- Writes a grant's tokens as another key has sealed them, if they are still the same.
-- KEYS[1] grant         the provider's grant
-- KEYS[2] grants        provider's uuid to how often its grant has changed
-- ARGV[1] provider      its uuid
-- ARGV[2] old_access    as they are sealed
-- ARGV[3] old_refresh
-- ARGV[4] access        as they are to be
-- ARGV[5] refresh
-- Returns {'resealed', 1} or {'changed', 0}: there are others by now.
-- include: grant

local now = redis.call('HMGET', KEYS[1], 'access', 'refresh')
if (now[1] or '') ~= ARGV[2] or (now[2] or '') ~= ARGV[3] then return { 'changed', 0 } end
redis.call('HSET', KEYS[1], 'access', ARGV[4], 'refresh', ARGV[5])
announce(KEYS[1], KEYS[2], ARGV[1])
return { 'resealed', 1 }
