-- include: number

-- A pool's place in its history: its epoch and position, and how its events are recorded. A sampled record has one
-- position in 17: a prime, so that it does not keep step with a streak and see always the same part of it.
local SAMPLED_ONE_IN = 17

-- Takes the next position; true if what happens there is recorded.
local function advance(pool)
  pool.position = pool.position + 1
  return pool.record == 'full' or (pool.record == 'sampled' and pool.position % SAMPLED_ONE_IN == 0)
end

-- Writes an event to the decision stream. Rare ones are written whenever events are recorded at all.
local function record_event(pool, kind, fields)
  if pool.record == 'off' then return end
  redis.call('XADD', pool.decisions, 'MAXLEN', '~', pool.keep, '*', 'event', kind, 'epoch', pool.epoch,
    'position', pool.position, 'now_ms', whole(pool.now), unpack(fields))
end

-- Reads the pool's place. When the caller has seen more than the pool remembers, acknowledged writes were lost in a
-- failover: the epoch rises, numbers go on from the highest seen, `lost` says how many.
local function open_pool(partitions, decisions, seen_epoch, seen_position, now)
  local stored = redis.call('HMGET', partitions, 'epoch', 'position', 'record', 'keep', 'broken')
  local pool = {
    epoch = tonumber(stored[1] or 1), position = tonumber(stored[2] or 0), record = stored[3] or 'off',
    keep = tonumber(stored[4] or 0), broken = stored[5] or '', decisions = decisions, now = now, lost = 0,
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

-- Writes back the pool's place, and keeps what is in use from expiring: the pool's state for 30 days, a worker's for 7.
local function close_pool(pool, partitions, shared, own)
  redis.call('HSET', partitions, 'epoch', pool.epoch, 'position', pool.position)
  if pool.is_broken_changed then redis.call('HSET', partitions, 'broken', pool.broken) end
  redis.call('PEXPIRE', partitions, 2592000000)
  for _, key in ipairs(shared) do redis.call('PEXPIRE', key, 2592000000) end
  if own then redis.call('PEXPIRE', own, 604800000) end
end
