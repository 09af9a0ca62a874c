-- The server's time in ms, or the one a test gave.
local function clock(now_ms)
  if now_ms > 0 then return now_ms end
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end
