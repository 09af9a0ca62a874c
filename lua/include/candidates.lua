-- include: number

-- The services of a partition, a line each, and the candidates among them, read no further than the tactic asks.

-- `window weight tier rpm tpm in_flight cost` are a line's numbers; a service's line is its id, a tab, `active` and
-- those. Before the first line stands an end of line, so that each id stands between one and a tab.
local LINE = '(%d+) (%d+) (%d+) (-?%d+) (-?%d+) (-?%d+) (%d+)'
local CURRENT_LINE, NUMBERS_OF_LINE = '^' .. LINE .. '$', '^(%d) ' .. LINE .. '\n'
local SERVICE_LINE = '^([^\n]+)\t(%d) ' .. LINE .. '\n()'
local REST_OF_LINE = '^%d %d+ %d+ %d+ %-?%d+ %-?%d+ %-?%d+ %d+\n()'

local function service_line(id, is_active, window, weight, tier, rpm, tpm, in_flight, cost)
  return {
    id = id, is_active = is_active, window = window + 0, weight = weight + 0, tier = tier + 0, rpm = rpm + 0,
    tpm = tpm + 0, in_flight = in_flight + 0, cost = cost + 0, looked_at_by = false, status = '', wait = false,
    has_limits = rpm ~= '0' or tpm ~= '0' or in_flight ~= '0',
  }
end

-- The line at that place of the text, nil at the end; `following` is where the next begins.
local function line_at(text, at) -- apart: reading
  local id, active, window, weight, tier, rpm, tpm, in_flight, cost, following = string.match(text, SERVICE_LINE, at)
  if not id then return nil end
  local line = service_line(id, active == '1', window, weight, tier, rpm, tpm, in_flight, cost)
  line.following = following
  return line
end

-- The numbers of that id's line, from its `active` on, and where the next line begins; nil without one.
local function find_numbers(text, id) -- apart: reading
  local start, at = '\n' .. id .. '\t', 1
  while true do
    local _, to = string.find(text, start, at, true)
    if not to then return nil end
    local following = string.match(text, REST_OF_LINE, to + 1)
    if following then return to + 1, following end
    at = to
  end
end

-- The line of that id, nil without one.
local function line_of(text, id) -- apart: reading
  local at = find_numbers(text, id)
  if not at then return nil end
  local active, window, weight, tier, rpm, tpm, in_flight, cost = string.match(text, NUMBERS_OF_LINE, at)
  return service_line(id, active == '1', window, weight, tier, rpm, tpm, in_flight, cost)
end

local function parse_services(text) -- apart: reading
  local list, count = {}, 0
  local line = line_at(text, 2)
  while line do
    count = count + 1
    list[count] = line
    line = line_at(text, line.following)
  end
  return list
end

-- The cursor's line, nil when it stands on nothing that is active.
local function parse_current(id, text)
  if text == '' then return nil end
  return service_line(id, true, string.match(text, CURRENT_LINE))
end

local function current_text(line) -- apart: reading
  return string.format('%d %d %d %d %d %d %d', line.window, line.weight, line.tier, line.rpm, line.tpm, line.in_flight,
    line.cost)
end
