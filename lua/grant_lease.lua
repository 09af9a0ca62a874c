-- Takes the lease on a provider's refresh, and so writes down the intent to use its refresh token, if that is due.
-- KEYS[1] grant         the provider's grant
-- KEYS[2] grants        provider's uuid to how often its grant has changed
-- ARGV[1] now_ms        0 for the server's clock
-- ARGV[2] provider      its uuid
-- ARGV[3] holder        who asks, another name for each request to the token endpoint
-- ARGV[4] lease_ms      for how long
-- ARGV[5] seed          names the family of tokens that the configuration begins; `r…` of a refresh token, `c…` of none
-- ARGV[6] revision      of the configuration
-- ARGV[7] due_ms        when the configuration's own access token is to be replaced, -1 for never
-- ARGV[8] rotates       1 if a refresh token is good for one use
-- ARGV[9] version       -1, or the version of an access token that an upstream has refused: its successor is due now
-- ARGV[10] least_ms     how old that token must be at least
-- Returns {'acquired', fence, now_ms, version, failures, refresh token (sealed, empty: the configuration's)},
--   {'held', ms}: by somebody else, for so long at most, {'later', ms}: after a failure, {'fresh', ms}: not due, for so
--   long (-1: ever), {'newer', version} than the one refused, {'lost', 0}, {'in_doubt', 0},
--   or {'left', 0}: in doubt from now on, whoever asked has never written what came of it.
-- include: clock
-- include: grant

local now_arg, lease_ms, revision = to_whole(ARGV[1], 0), to_whole(ARGV[4], 1), to_whole(ARGV[6], 0)
local version_arg, own_due, least_ms = tonumber(ARGV[9]), tonumber(ARGV[7]), to_whole(ARGV[10], 0)
if not (now_arg and lease_ms and revision and version_arg and own_due and least_ms) or ARGV[2] == ''
  or ARGV[3] == '' or not string.find(ARGV[5], '^[rc]%x+$') then
  return redis.error_reply('BALANCER grant_lease: malformed argument')
end
local now, seed, rotates = clock(now_arg), ARGV[5], ARGV[8] == '1'

local names = { 'state', 'seeds', 'revision', 'version', 'fence', 'due_ms', 'again_ms', 'lease_until_ms', 'renewed_ms',
  'failures', 'holder', 'refresh' }
local values, grant = redis.call('HMGET', KEYS[1], unpack(names)), {}
for i = 1, #names do grant[names[i]] = values[i] or '' end
local function number(name) return tonumber(grant[name]) or 0 end

-- A login that the fleet has not had begins a family. One that it has had never does again: its refresh token may be
-- used up. A client without a refresh token has nothing to use up: there the newest configuration counts.
local seeds = grant.seeds
local is_new = not knows_seed(seeds, seed)
if string.sub(seed, 1, 1) == 'c' then
  local current = string.match(seeds, '^%S+') or ''
  is_new = current ~= seed and (current == '' or revision > number('revision'))
end
if is_new then
  local kept, count = seed, 1
  for known in string.gmatch(seeds, '%S+') do
    if known ~= seed and count < 64 then kept, count = kept .. ' ' .. known, count + 1 end
  end
  grant = {
    state = 'ready', seeds = kept, revision = ARGV[6], version = whole(number('version') + 1), due_ms = whole(own_due),
    again_ms = '0', lease_until_ms = '0', renewed_ms = '0', failures = '0', holder = '', refresh = '',
    fence = whole(number('fence') + 1), -- What is still on its way for the old family comes too late.
  }
  local flat = { 'access', '', 'ends_ms', '0', 'fault', '' }
  for name, value in pairs(grant) do
    flat[#flat + 1] = name
    flat[#flat + 1] = value
  end
  redis.call('HSET', KEYS[1], unpack(flat))
  announce(KEYS[1], KEYS[2], ARGV[2])
end

-- Who asks again under the same name has not sent anything yet.
local is_ours = grant.holder == ARGV[3]
if grant.state == 'in_doubt' and is_ours then grant.state = 'asking' end
if grant.state == 'lost' or grant.state == 'in_doubt' then return { grant.state, 0 } end
-- As long as a family has only what the configuration brought, only who has that configuration may ask.
if grant.refresh == '' and string.match(grant.seeds, '^%S+') ~= seed then return { 'held', 1000 } end
local is_again = grant.state == 'asking' and is_ours
if grant.state == 'asking' and not is_again then
  local left = number('lease_until_ms') - now
  if left > 0 then return { 'held', left } end
  if rotates then
    redis.call('HSET', KEYS[1], 'state', 'in_doubt', 'fault', 'the worker that asked has left no answer')
    announce(KEYS[1], KEYS[2], ARGV[2])
    return { 'left', 0 }
  end
end
if not is_again then
  if number('again_ms') > now then return { 'later', number('again_ms') - now } end
  if version_arg >= 0 then
    if number('version') ~= version_arg then return { 'newer', number('version') } end
    local young_ms = number('renewed_ms') + least_ms - now
    if number('renewed_ms') > 0 and young_ms > 0 then return { 'fresh', young_ms } end
  elseif number('due_ms') < 0 then
    return { 'fresh', -1 }
  elseif number('due_ms') > now then
    return { 'fresh', number('due_ms') - now }
  end
end
local fence = number('fence') + (is_again and 0 or 1)
redis.call('HSET', KEYS[1], 'state', 'asking', 'fence', whole(fence), 'holder', ARGV[3], 'lease_until_ms',
  whole(now + lease_ms))
announce(KEYS[1], KEYS[2], ARGV[2])
return { 'acquired', fence, now, number('version'), number('failures'), grant.refresh }
