-- Keeps new tokens, if they are those of the last lease. Done twice, it changes nothing more.
-- KEYS[1] grant         the provider's grant
-- KEYS[2] grants        provider's uuid to how often its grant has changed
-- ARGV[1] provider      its uuid
-- ARGV[2] fence         of the lease
-- ARGV[3] version       of the new access token
-- ARGV[4] access        the access token, sealed
-- ARGV[5] refresh       the refresh token, sealed, empty for none
-- ARGV[6] ends_ms       when the access token ends, 0 if nobody knows
-- ARGV[7] due_ms        when it is to be replaced, -1 for never
-- ARGV[8] renewed_ms    when it was asked for
-- ARGV[9] seeds         the names of its families, where the store has lost the grant
-- ARGV[10] revision     likewise the configuration's
-- Returns {'kept', version} or {'fenced', fence}: another lease was given since, or another login.
-- include: grant

local fence, version, renewed_ms = to_whole(ARGV[2], 1), to_whole(ARGV[3], 1), to_whole(ARGV[8], 1)
local has_times = renewed_ms and to_whole(ARGV[6], 0) and tonumber(ARGV[7])
if not (fence and version and has_times) or ARGV[4] == '' or ARGV[9] == '' then
  return redis.error_reply('BALANCER grant_keep: malformed argument')
end
local head = redis.call('HMGET', KEYS[1], 'fence', 'version')
local last, stands = tonumber(head[1] or 0), tonumber(head[2] or 0)
if last > fence then return { 'fenced', last } end
if stands < version then
  redis.call('HSETNX', KEYS[1], 'seeds', ARGV[9])
  redis.call('HSETNX', KEYS[1], 'revision', ARGV[10])
  redis.call('HSET', KEYS[1], 'state', 'ready', 'version', ARGV[3], 'fence', ARGV[2], 'access', ARGV[4],
    'refresh', ARGV[5], 'ends_ms', ARGV[6], 'due_ms', ARGV[7], 'renewed_ms', ARGV[8], 'again_ms', '0',
    'lease_until_ms', '0', 'failures', '0', 'fault', '', 'holder', '')
  announce(KEYS[1], KEYS[2], ARGV[1])
end
return { 'kept', math.max(stands, version) }
