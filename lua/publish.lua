-- Prepares a revision: writes its snapshot, notes it as pending and appends it to the log of changes, if the head is
-- still the one it was made from.
-- KEYS[1] head          revision, digest, pending
-- KEYS[2] snapshot      of the new revision
-- KEYS[3] changes       the log, a stream
-- ARGV[1] base          the revision that the new one was made from, 0 for none
-- ARGV[2] revision      the new one
-- ARGV[3] document      the snapshot, JSON
-- ARGV[4] now_ms        0 for the server's time
-- ARGV[5] change        who made it of what, JSON
-- ARGV[6] kept          how many changes are kept
-- ARGV[7] age_ms        for how long
-- Returns {'prepared', revision}, {'pending', revision}: another publication is under way, or {'conflict', revision}:
--   the head is this one by now.
-- include: clock
-- include: changes

local head = redis.call('HMGET', KEYS[1], 'revision', 'pending')
local revision, pending = tonumber(head[1] or 0), tonumber(head[2] or 0)
if pending > 0 then return {'pending', pending} end
if revision ~= tonumber(ARGV[1]) then return {'conflict', revision} end
redis.call('SET', KEYS[2], ARGV[3])
redis.call('HSET', KEYS[1], 'pending', ARGV[2])
note_change(KEYS[3], ARGV[5], tonumber(ARGV[6]), clock(tonumber(ARGV[4])) - tonumber(ARGV[7]))
return {'prepared', tonumber(ARGV[2])}
