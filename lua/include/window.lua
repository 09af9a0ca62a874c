-- include: number

-- A service's windows, one for each distinct length that rules of the pool give it: an array of
-- {length = seconds, start = ms, requests =, tokens =, output = (of the tokens)}, kept as text
-- `length start requests tokens output` joined by `;`.
local function parse_windows(text)
  local windows = {}
  for length, start, requests, tokens, output in string.gmatch(text or '', '(%d+) (%d+) (%d+) (%d+) (%d+)') do
    windows[#windows + 1] = {
      length = tonumber(length), start = tonumber(start), requests = tonumber(requests), tokens = tonumber(tokens),
      output = tonumber(output),
    }
  end
  return windows
end

local function windows_text(windows)
  local parts = {}
  for i, w in ipairs(windows) do
    parts[i] = whole(w.length) .. ' ' .. whole(w.start) .. ' ' .. whole(w.requests) .. ' ' .. whole(w.tokens) .. ' '
      .. whole(w.output)
  end
  return table.concat(parts, ';')
end

-- Tumbling: it has ended when its length has passed since its start.
local function has_ended(window, now)
  return now - window.start >= window.length * 1000
end

-- Opens a new window where the last one has ended, and pulls a start in the future to now. Called by what counts.
local function roll_windows(windows, now)
  for _, w in ipairs(windows) do
    if has_ended(w, now) then
      w.start, w.requests, w.tokens, w.output = now, 0, 0, 0
    elseif w.start > now then
      w.start = now
    end
  end
end

-- What the window of that length counts at this moment; zeros when it has ended. Opens none.
local function window_counts(windows, length, now)
  for _, w in ipairs(windows) do
    if w.length == length then
      if has_ended(w, now) then return 0, 0 end
      return w.requests, w.tokens
    end
  end
  return 0, 0
end
