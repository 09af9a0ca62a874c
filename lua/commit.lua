-- Moves the head to the pending revision, whose fences are raised, and announces it. Done twice, it changes nothing
-- more.
-- KEYS[1] head          revision, digest, pending
-- KEYS[2] digests       digest of a file to the revision made of it
-- KEYS[3] outdated      the snapshot that is no longer kept
-- ARGV[1] revision      the pending one
-- ARGV[2] digest        of the file that it was made of, empty for none
-- ARGV[3] kept          how many digests are kept
-- ARGV[4] feed          the channel that announces it
-- Returns {'committed', revision} or {'gone', revision}: it was not pending, the head is this one.

local revision = tonumber(redis.call('HGET', KEYS[1], 'revision') or 0)
local pending = tonumber(redis.call('HGET', KEYS[1], 'pending') or 0)
if pending ~= tonumber(ARGV[1]) then return {'gone', revision} end
redis.call('HSET', KEYS[1], 'revision', ARGV[1], 'digest', ARGV[2])
redis.call('HDEL', KEYS[1], 'pending')
redis.call('DEL', KEYS[3])
if ARGV[2] ~= '' then
  redis.call('HSET', KEYS[2], ARGV[2], ARGV[1])
  local flat = redis.call('HGETALL', KEYS[2])
  if #flat / 2 > tonumber(ARGV[3]) then
    local oldest, at
    for i = 1, #flat, 2 do
      if not at or tonumber(flat[i + 1]) < at then oldest, at = flat[i], tonumber(flat[i + 1]) end
    end
    redis.call('HDEL', KEYS[2], oldest)
  end
end
redis.call('PUBLISH', ARGV[4], ARGV[1])
return {'committed', pending}
