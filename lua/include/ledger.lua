-- include: service

-- How the end of an attempt changes its service. Shared by settle, reap and clear.
local ledger_fields = {
  'windows', 'in_flight', 'reserved', 'requests', 'failures', 'input', 'output', 'cached', 'cache_creation',
  'reasoning', 'lost', 'lost_tokens', 'abandoned', 'last_used', 'cleared',
}

-- Adds tokens to the windows open at `now - age_ms`; a fresh entry (age 0) opens a new one where the last has ended.
local function add_window_tokens(service, input, output, now, age_ms)
  if age_ms == 0 then roll_windows(service.windows, now) end
  for _, w in ipairs(service.windows) do
    if not has_ended(w, now) and now - age_ms >= w.start then
      w.tokens, w.output = w.tokens + input + output, w.output + output
    end
  end
end

-- Gives back what a live holding held.
local function release(service, reserved)
  service.in_flight = service.in_flight - 1
  service.reserved = service.reserved - reserved
  service.is_changed = true
end

-- Counts an attempt whose worker died: one request and its reserved estimate, apart from what upstreams reported.
local function count_lost(service, reserved, now)
  release(service, reserved)
  service.requests = service.requests + 1
  service.lost = service.lost + 1
  service.lost_tokens = service.lost_tokens + reserved
  add_window_tokens(service, reserved, 0, now, 0)
end

-- Takes back count_lost: the worker was only late. What was cleared in between is not there to be taken back.
local function uncount_lost(service, reserved, reaped_ms, position)
  if position <= service.cleared then return end
  service.requests = service.requests - 1
  service.lost = service.lost - 1
  service.lost_tokens = service.lost_tokens - reserved
  for _, w in ipairs(service.windows) do
    if reaped_ms >= w.start then w.tokens = math.max(0, w.tokens - reserved) end
  end
  service.is_changed = true
end
