-- include: number

-- What was used in the last minute, by steps of five seconds: `bucket requests tokens` joined by `;`, ascending. A
-- step counts for as long as any part of it is within the last 60 s, so that no minute ever holds more than it says.
local MINUTE_STEP_MS, MINUTE_STEPS = 5000, 12

-- The steps that still count, and their sums. A step in the future counts as now.
local function read_minute(text, now)
  local current = math.floor(now / MINUTE_STEP_MS)
  local minute = {steps = {}, requests = 0, tokens = 0}
  for bucket, requests, tokens in string.gmatch(text, '(%d+) (%d+) (%d+)') do
    bucket, requests, tokens = math.min(tonumber(bucket), current), tonumber(requests), tonumber(tokens)
    if bucket >= current - MINUTE_STEPS then
      local last = minute.steps[#minute.steps]
      if last and last.bucket == bucket then
        last.requests, last.tokens = last.requests + requests, last.tokens + tokens
      else
        minute.steps[#minute.steps + 1] = {bucket = bucket, requests = requests, tokens = tokens}
      end
      minute.requests, minute.tokens = minute.requests + requests, minute.tokens + tokens
    end
  end
  return minute
end

-- The text once more is counted.
local function count_minute(text, now, requests, tokens)
  local steps, current = read_minute(text, now).steps, math.floor(now / MINUTE_STEP_MS)
  if requests + tokens > 0 then
    local last = steps[#steps]
    if not last or last.bucket < current then
      last = {bucket = current, requests = 0, tokens = 0}
      steps[#steps + 1] = last
    end
    last.requests, last.tokens = last.requests + requests, last.tokens + tokens
  end
  local parts = {}
  for i, step in ipairs(steps) do
    parts[i] = whole(step.bucket) .. ' ' .. whole(step.requests) .. ' ' .. whole(step.tokens)
  end
  return table.concat(parts, ';')
end

-- Ms until `excess` more of `name` (requests or tokens) no longer counts.
local function minute_wait(minute, name, excess, now)
  local gone = 0
  for _, step in ipairs(minute.steps) do
    gone = gone + step[name]
    if gone >= excess then return (step.bucket + MINUTE_STEPS + 1) * MINUTE_STEP_MS - now end
  end
  return 60000
end
