-- Puts back what a worker knows of a grant, where the store has lost it: after a failover, or when it was emptied. That
-- may be tokens, or the intent to use a refresh token alone.
-- KEYS[1] grant         the provider's grant
-- KEYS[2] grants        provider's uuid to how often its grant has changed
-- ARGV[1] provider      its uuid
-- ARGV[2] version       of the access token that is known
-- ARGV[3] fence         the highest that is known
-- ARGV[4…] fields       name and value by turns
-- Returns {'restored', version} or {'kept', version}: the store has one as new.
-- include: grant

local version, fence = to_whole(ARGV[2], 1), to_whole(ARGV[3], 0)
if not (version and fence) or #ARGV < 5 or #ARGV % 2 == 0 then
  return redis.error_reply('BALANCER grant_restore: malformed argument')
end
local head = redis.call('HMGET', KEYS[1], 'version', 'fence')
local stands, last = tonumber(head[1] or 0), tonumber(head[2] or 0)
if stands > version or (stands == version and last >= fence) then return { 'kept', stands } end
-- Leases that were given on what was lost are void; the one whose intent is put back is not.
if stands < version then fence = math.max(fence, last) + 1 end
local fields = {}
for at = 4, #ARGV do fields[#fields + 1] = ARGV[at] end
redis.call('DEL', KEYS[1])
redis.call('HSET', KEYS[1], 'version', ARGV[2], 'fence', whole(fence),
  unpack(fields))
announce(KEYS[1], KEYS[2], ARGV[1])
return { 'restored', version }
