-- include: minute

-- Limits: rpm, tpm and in_flight, 0 for none, below zero where nothing is let through.
local LIMIT_NEVER = -1
local LIMIT_UNKNOWN_MS = 1000

local function has_limits(limits)
  return limits.rpm ~= 0 or limits.tpm ~= 0 or limits.in_flight ~= 0
end

-- The longer of two waits; nil is none, LIMIT_NEVER the longest.
local function longer(a, b)
  if a == LIMIT_NEVER or b == LIMIT_NEVER then return LIMIT_NEVER end
  if a and b then return math.max(a, b) end
  return a or b
end

-- Ms until a request that reserves so many tokens may be let through, LIMIT_NEVER if it is too large by itself, nil if
-- it may at once. `used` has `minute`, `in_flight` and `reserved`.
local function limit_wait(limits, used, reserved, now)
  if not has_limits(limits) then return nil end
  local wait
  if limits.rpm < 0 or limits.tpm < 0 or limits.in_flight < 0 then wait = LIMIT_UNKNOWN_MS end
  if limits.in_flight > 0 and used.in_flight >= limits.in_flight then wait = longer(wait, LIMIT_UNKNOWN_MS) end
  if limits.rpm > 0 or limits.tpm > 0 then
    local minute = read_minute(used.minute, now)
    if limits.rpm > 0 and minute.requests + 1 > limits.rpm then
      wait = longer(wait, minute_wait(minute, 'requests', minute.requests + 1 - limits.rpm, now))
    end
    if limits.tpm > 0 then
      local over = minute.tokens + used.reserved + reserved - limits.tpm
      if reserved > limits.tpm then
        wait = LIMIT_NEVER
      elseif over > minute.tokens then
        wait = longer(wait, LIMIT_UNKNOWN_MS)
      elseif over > 0 then
        wait = longer(wait, minute_wait(minute, 'tokens', over, now))
      end
    end
  end
  return wait
end
