-- Tells which grants have changed, and what time it is.
-- KEYS[1] grants        provider's uuid to how often its grant has changed
-- Returns {now_ms, uuid, changes, uuid, changes, …}.
-- include: clock

local reply = redis.call('HGETALL', KEYS[1])
table.insert(reply, 1, clock(0))
return reply
