-- Appends to the log of changes. What is older than that is trimmed, else what is beyond the number kept: XADD does one
-- of the two, and an entry that is too old leaves its place to the new one.
local function note_change(key, change, kept, oldest_ms)
  local first = redis.call('XRANGE', key, '-', '+', 'COUNT', 1)[1]
  if first and tonumber(string.match(first[1], '^%d+')) < oldest_ms then
    return redis.call('XADD', key, 'MINID', string.format('%.0f', oldest_ms), '*', 'change', change)
  end
  return redis.call('XADD', key, 'MAXLEN', kept, '*', 'change', change)
end
