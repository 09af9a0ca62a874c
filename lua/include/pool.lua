-- include: number

-- A pool's place in its history: its epoch and position. When the caller has seen more than the pool remembers,
-- acknowledged writes were lost in a failover: the epoch rises, numbers go on from the highest seen, `lost` says how
-- many.
local function open_pool(partitions, seen_epoch, seen_position)
  local stored = redis.call('HMGET', partitions, 'epoch', 'position')
  local pool = {epoch = tonumber(stored[1] or 1), position = tonumber(stored[2] or 0), lost = 0}
  if seen_epoch > pool.epoch or (seen_epoch == pool.epoch and seen_position > pool.position) then
    if seen_position > pool.position then pool.lost = seen_position - pool.position end
    pool.epoch = seen_epoch + 1
    pool.position = math.max(pool.position, seen_position)
  end
  return pool
end

-- Takes the next position.
local function advance(pool)
  pool.position = pool.position + 1
  return pool.position
end

-- Writes an event to the decision stream, if it is recorded.
local function record_event(stream, keep, pool, kind, now, fields)
  if keep == 0 then return end
  redis.call('XADD', stream, 'MAXLEN', '~', keep, '*', 'event', kind, 'epoch', pool.epoch, 'position', pool.position,
    'now_ms', whole(now), unpack(fields))
end

-- Writes back the pool's place, and keeps what is in use from expiring: the pool's state for 30 days, a worker's for 7.
local function close_pool(pool, partitions, shared, own)
  redis.call('HSET', partitions, 'epoch', pool.epoch, 'position', pool.position)
  redis.call('PEXPIRE', partitions, 2592000000)
  for _, key in ipairs(shared) do redis.call('PEXPIRE', key, 2592000000) end
  if own then redis.call('PEXPIRE', own, 604800000) end
end
