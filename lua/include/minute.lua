-- What was used in the last minute, by steps of five seconds. A step counts for as long as any part of it is within the
-- last 60 s, so that no minute ever holds more than it says. Kept as text, '' for nothing: `requests tokens` of all
-- steps but the last, `step requests tokens` of the last, and the steps before it, each behind a `;`, the oldest first.
-- These are looked at only when another step begins.
local MINUTE_STEP_MS, MINUTE_STEPS = 5000, 12

local function parse_minute(text) -- apart: limits
  local older_requests, older_tokens, step, requests, tokens, older =
    string.match(text, '^(%d+) (%d+) (%d+) (%d+) (%d+)(.*)$')
  if not step then older_requests, older_tokens, step, requests, tokens, older = 0, 0, -1, 0, 0, '' end
  return {
    older_requests = older_requests + 0, older_tokens = older_tokens + 0, step = step + 0, requests = requests + 0,
    tokens = tokens + 0, older = older, current = false, is_counted = false,
  }
end

-- Its steps, `step requests tokens` joined by `;`, the oldest first.
local function steps_text(minute) -- apart: rare
  if minute.step < 0 then return '' end
  local last = string.format('%d %d %d', minute.step, minute.requests, minute.tokens)
  return string.sub(minute.older .. ';' .. last, 2)
end

-- Begins another step behind the last.
local function begin_step(minute, step) -- apart: rare
  if minute.step >= 0 then minute.older = ';' .. steps_text(minute) end
  minute.older_requests = minute.older_requests + minute.requests
  minute.older_tokens = minute.older_tokens + minute.tokens
  minute.step, minute.requests, minute.tokens = step, 0, 0
end

-- The minute without the steps that no longer count; those of the future count as now.
local function roll_minute(steps, current) -- apart: rare
  local minute = parse_minute('')
  for step, requests, tokens in string.gmatch(steps, '(%d+) (%d+) (%d+)') do
    step = math.min(step, current)
    if step >= current - MINUTE_STEPS then
      if step ~= minute.step then begin_step(minute, step) end
      minute.requests, minute.tokens = minute.requests + requests, minute.tokens + tokens
    end
  end
  return minute
end

-- The minute of what is measured, a service or a meter, as it is now; read once a call. What is kept changes only when
-- something is counted.
local function minute_of(used, now) -- apart: limits
  local minute = used.minute
  if minute then return minute end
  local current = math.floor(now / MINUTE_STEP_MS)
  minute = parse_minute(used.minute_text)
  if minute.step ~= current and minute.step >= 0 then minute = roll_minute(steps_text(minute), current) end
  minute.current, used.minute = current, minute
  return minute
end

-- Counts more, and keeps no more of what no longer counts.
local function count_minute(used, now, requests, tokens) -- apart: limits
  local minute = used.minute or minute_of(used, now)
  minute.is_counted = true
  if requests + tokens > 0 then
    if minute.step ~= minute.current then begin_step(minute, minute.current) end
    minute.requests, minute.tokens = minute.requests + requests, minute.tokens + tokens
  end
end

-- The text of one in which something was counted.
local function minute_text(minute) -- apart: limits
  if minute.step < 0 then return '' end
  return string.format('%d %d %d %d %d', minute.older_requests, minute.older_tokens, minute.step, minute.requests,
    minute.tokens) .. minute.older
end

-- The steps that are kept, as an event tells them.
local function kept_steps(used) -- apart: rare
  local minute = used.minute
  return steps_text(minute and minute.is_counted and minute or parse_minute(used.minute_text))
end

-- Ms until `excess` more requests (or tokens) no longer count.
local function minute_wait(minute, is_tokens, excess, now) -- apart: rare
  local gone = 0
  for step, requests, tokens in string.gmatch(steps_text(minute), '(%d+) (%d+) (%d+)') do
    gone = gone + (is_tokens and tokens or requests)
    if gone >= excess then return (step + MINUTE_STEPS + 1) * MINUTE_STEP_MS - now end
  end
  return 60000
end
