-- include: number

-- A service's windows, one for each distinct length that rules of the pool give it: an array of
-- {length = seconds, start = ms, requests =, tokens =, output = (of the tokens)}, kept as text
-- `length start requests tokens output` joined by `;`.
local WINDOW = '^(%d+) (%d+) (%d+) (%d+) (%d+);?()'

local function parse_windows(text)
  local windows, count, at, last = {}, 0, 1, #text
  while at <= last do
    local length, start, requests, tokens, output, following = string.match(text, WINDOW, at)
    count, at = count + 1, following
    windows[count] = {
      length = length + 0, start = start + 0, requests = requests + 0, tokens = tokens + 0, output = output + 0,
    }
  end
  return windows
end

local function window_text(w)
  return string.format('%d %d %d %d %d', w.length, w.start, w.requests, w.tokens, w.output)
end

local function windows_text(windows)
  if not windows[2] then return windows[1] and window_text(windows[1]) or '' end
  local parts = {}
  for i, w in ipairs(windows) do parts[i] = window_text(w) end
  return table.concat(parts, ';')
end

-- Tumbling: it has ended when its length has passed since its start.
local function has_ended(window, now)
  return now - window.start >= window.length * 1000
end

-- Opens new windows where the last ones have ended, and pulls a start in the future to now; once a call. Called by what
-- counts.
local function roll_windows(service, now)
  service.is_rolled = true
  for _, w in ipairs(service.windows) do
    if has_ended(w, now) then
      w.start, w.requests, w.tokens, w.output = now, 0, 0, 0
    elseif w.start > now then
      w.start = now
    end
  end
end

-- What the window of that length counts at this moment; zeros when it has ended. Opens none.
local function window_counts(windows, length, now)
  for i = 1, #windows do
    local w = windows[i]
    if w.length == length then
      if has_ended(w, now) then return 0, 0 end
      return w.requests, w.tokens
    end
  end
  return 0, 0
end
