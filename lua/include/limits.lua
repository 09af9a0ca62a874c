-- include: minute

-- Limits: rpm, tpm and in_flight, 0 for none, below zero where nothing is let through.
local LIMIT_NEVER = -1
local LIMIT_UNKNOWN_MS = 1000

-- The longer of two waits; nil is none, LIMIT_NEVER the longest.
local function longer(a, b) -- apart: limits
  if a == LIMIT_NEVER or b == LIMIT_NEVER then return LIMIT_NEVER end
  if a and b then return math.max(a, b) end
  return a or b
end

-- Ms until a request that reserves so many tokens may be let through, LIMIT_NEVER if it is too large by itself, nil if
-- it may at once. `used` is a service or a meter.
local function limit_wait(limits, used, reserved, now) -- apart: limits
  local rpm, tpm, in_flight, wait = limits.rpm, limits.tpm, limits.in_flight, nil
  if rpm < 0 or tpm < 0 or in_flight < 0 then wait = LIMIT_UNKNOWN_MS end
  if in_flight > 0 and used.in_flight >= in_flight then wait = longer(wait, LIMIT_UNKNOWN_MS) end
  if rpm <= 0 and tpm <= 0 then return wait end
  local minute = used.minute or minute_of(used, now)
  if rpm > 0 then
    local over = minute.older_requests + minute.requests + 1 - rpm
    if over > 0 then wait = longer(wait, minute_wait(minute, false, over, now)) end
  end
  if tpm > 0 then
    local tokens = minute.older_tokens + minute.tokens
    local over = tokens + used.reserved + reserved - tpm
    if reserved > tpm then
      wait = LIMIT_NEVER
    elseif over > tokens then
      wait = longer(wait, LIMIT_UNKNOWN_MS)
    elseif over > 0 then
      wait = longer(wait, minute_wait(minute, true, over, now))
    end
  end
  return wait
end
