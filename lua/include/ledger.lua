-- include: breaker
-- include: minute
-- include: service

-- How the end of an attempt changes its service. Shared by tick, reap and health.

-- A service as an event of a settle, reap or health tells it: `in_flight reserved`, the totals, and
-- `cooldown first_token per_token measured`.
local function event_text(service) -- apart: rare
  return with_texts(service, string.format('%d %d ', service.in_flight, service.reserved)
    .. totals_text(service.totals) .. string.format(' %d %d %d %d', service.cooldown, service.first_token,
    service.per_token, service.measured))
end

local LATENCY_MS, LATENCY_FORGOTTEN_MS = 10000, 600000

-- What an attempt in flight holds: `h reserved deadline_ms meters probe id`; nil for any other text.
local function read_holding(text)
  local reserved, deadline, meters, probe, id = string.match(text, '^h (%d+) (%d+) (%d) (%d+) (.+)$')
  if not reserved then return nil end
  return {
    reserved = reserved + 0, deadline = deadline + 0, probe = probe + 0, id = id, is_lost = false,
    is_metered = meters ~= '0', meters_service = meters == '1' or meters == '3',
    meters_provider = meters == '2' or meters == '3',
  }
end

-- What was counted as lost: `l reserved reaped_ms position id`; nil for any other text.
local function read_lost(text) -- apart: rare
  local reserved, reaped_ms, position, id = string.match(text, '^l (%d+) (%d+) (%d+) (.+)$')
  if not reserved then return nil end
  return {reserved = reserved + 0, reaped_ms = reaped_ms + 0, position = position + 0, id = id, is_lost = true}
end

-- Adds tokens to the windows open at `now - age_ms`; a fresh entry (age 0) opens a new one where the last has ended.
local function add_window_tokens(service, input, output, now, age_ms)
  if age_ms == 0 and not service.is_rolled then roll_windows(service, now) end
  local windows = service.windows
  for i = 1, #windows do
    local w = windows[i]
    if age_ms == 0 or (not has_ended(w, now) and now - age_ms >= w.start) then
      w.tokens, w.output = w.tokens + input + output, w.output + output
    end
  end
end

-- Counts tokens in the minutes that the attempt was let through by.
local function add_minute_tokens(service, holding, tokens, now) -- apart: limits
  if holding.meters_service then count_minute(service, now, 0, tokens) end
  if holding.meters_provider then count_minute(service.meter, now, 0, tokens) end
end

-- Gives back what a live holding held.
local function release(service, holding)
  service.in_flight = service.in_flight - 1
  service.reserved = service.reserved - holding.reserved
  service.is_changed = true
  if holding.meters_provider then
    local meter = service.meter
    meter.in_flight, meter.reserved = meter.in_flight - 1, meter.reserved - holding.reserved
    meter.is_changed = true
  end
end

-- Counts an attempt whose worker died: one request and its reserved estimate, apart from what upstreams reported.
local function count_lost(service, holding, now)
  release(service, holding)
  local totals = service.totals
  totals[REQUESTS], totals[LOST] = totals[REQUESTS] + 1, totals[LOST] + 1
  totals[LOST_TOKENS] = totals[LOST_TOKENS] + holding.reserved
  add_window_tokens(service, holding.reserved, 0, now, 0)
  add_minute_tokens(service, holding, holding.reserved, now)
end

-- Takes back what was counted as lost: the worker was only late. What was cleared in between is not there to be taken
-- back.
local function uncount_lost(service, lost) -- apart: rare
  local totals = service.totals
  if lost.position <= totals[CLEARED] + 0 then return end
  totals[REQUESTS], totals[LOST] = totals[REQUESTS] - 1, totals[LOST] - 1
  totals[LOST_TOKENS] = totals[LOST_TOKENS] - lost.reserved
  for _, w in ipairs(service.windows) do
    if lost.reaped_ms >= w.start then w.tokens = math.max(0, w.tokens - lost.reserved) end
  end
  service.is_changed = true
end

-- The mean of a duration after one more sample: at once up to a peak, and down again within some ten seconds.
local function peak_mean(mean, sample, passed_ms)
  if mean == 0 or sample >= mean then return sample end
  return mean - math.floor((mean - sample) * passed_ms / (passed_ms + LATENCY_MS))
end

-- Notes how fast a service was; 0 is not known.
local function add_latency(service, first_token_us, stream_us, output, now)
  local has_rate = stream_us > 0 and output > 0
  if first_token_us == 0 and not has_rate then return end
  local passed = service.measured > 0 and math.min(math.max(0, now - service.measured), LATENCY_FORGOTTEN_MS) or 0
  if first_token_us > 0 then service.first_token = peak_mean(service.first_token, first_token_us, passed) end
  if has_rate then service.per_token = peak_mean(service.per_token, math.floor(stream_us / output), passed) end
  service.measured, service.is_changed = now, true
end
