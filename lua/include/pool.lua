-- include: number

-- A pool's place in its history: its epoch and position, and how its events are recorded. A sampled record has one
-- position in 17: a prime, so that it does not keep step with a streak and see always the same part of it.
local SAMPLED_ONE_IN = 17
-- 30 and 7 days after the last use, which is noted once a minute.
local STATE_LIVES_MS, HOLDINGS_LIVE_MS, RENEWED_MS = 2592060000, 604860000, 60000
-- A value longer than 64 bytes makes the server keep a hash as a table. A small one is a list, in which each reading
-- looks at all that stands before.
local LONG_PLACE, LONG_LAST = '%d %d %70d', '%d %70d'

-- The fields of the services' hash that open_pool takes: `epoch position renewed_ms`, `mode keep revision` and the
-- breakers that are not closed.
local function place_fields()
  return {'place', 'record', 'broken'}
end

-- Takes the next position; true if what happens there is recorded.
local function advance(pool)
  local position = pool.position + 1
  pool.position, pool.is_changed = position, true
  return pool.record == 'full' or (pool.record == 'sampled' and position % SAMPLED_ONE_IN == 0)
end

-- Writes an event to the decision stream. Rare ones are written whenever events are recorded at all.
local function record_event(pool, kind, fields) -- apart: rare
  if pool.record == 'off' then return end
  pool.has_recorded = true
  local keep = string.match(pool.record_text, ' (%d+)')
  redis.call('XADD', pool.decisions, 'MAXLEN', '~', keep, '*', 'event', kind, 'epoch', pool.epoch, 'position',
    pool.position, 'now_ms', whole(pool.now), unpack(fields))
end

-- The pool out of its fields. When the caller has seen more than it remembers, acknowledged writes were lost in a
-- failover: the epoch rises, numbers go on from the highest seen, `lost` says how many.
local function open_pool(fields, decisions, seen_epoch, seen_position, now)
  local epoch, position, renewed = string.match(fields[1] or '1 0 0', '^(%d+) (%d+) +(%d+)$')
  local record_text = fields[2] or 'off 0 -1'
  local pool = {
    epoch = epoch + 0, position = position + 0, renewed = renewed + 0, record = string.match(record_text, '^%a+'),
    record_text = record_text, broken = fields[3] or '', decisions = decisions, now = now, lost = 0,
    is_changed = not fields[1], is_broken_changed = false, has_recorded = false,
  }
  if seen_epoch > pool.epoch or (seen_epoch == pool.epoch and seen_position > pool.position) then
    local was_epoch, was_position = pool.epoch, pool.position
    pool.lost = math.max(0, seen_position - was_position)
    pool.epoch = seen_epoch + 1
    pool.position = math.max(was_position, seen_position)
    advance(pool)
    record_event(pool, 'epoch', {'was_epoch', was_epoch, 'was_position', was_position, 'lost', pool.lost})
  end
  return pool
end

-- Writes the pool's place and what else has changed in the services' hash, and keeps all of the pool's keys from
-- expiring; `leases_key` may be nil. `is_new` says that one of them may be new.
local function close_pool(pool, services_key, set, partitions_key, leases_key, is_new)
  local renews = pool.now - pool.renewed >= RENEWED_MS or pool.renewed > pool.now
  if renews then pool.renewed = pool.now end
  if renews or pool.is_changed then
    set[#set + 1] = 'place'
    set[#set + 1] = string.format(LONG_PLACE, pool.epoch, pool.position, pool.renewed)
  end
  if pool.is_broken_changed then
    set[#set + 1] = 'broken'
    set[#set + 1] = pool.broken
  end
  local added = #set > 0 and redis.call('HSET', services_key, unpack(set)) or 0
  if renews or is_new or added > 0 then
    redis.call('PEXPIRE', services_key, STATE_LIVES_MS)
    redis.call('PEXPIRE', partitions_key, STATE_LIVES_MS)
    if leases_key then redis.call('PEXPIRE', leases_key, STATE_LIVES_MS) end
  end
  if renews or pool.has_recorded then redis.call('PEXPIRE', pool.decisions, STATE_LIVES_MS) end
end
