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

-- The line at that place of the text, and where the next begins; nil at the end.
local function line_at(text, at) -- apart: reading
  local id, active, window, weight, tier, rpm, tpm, in_flight, cost, following = string.match(text, SERVICE_LINE, at)
  if not id then return nil end
  return service_line(id, active == '1', window, weight, tier, rpm, tpm, in_flight, cost), following
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
  local line, at = line_at(text, 2)
  while line do
    count = count + 1
    list[count] = line
    line, at = line_at(text, at)
  end
  return list
end

-- The cursor's line, nil when it stands on nothing that is active.
local function parse_current(id, text)
  if text == '' then return nil end
  return service_line(id, true, string.match(text, CURRENT_LINE))
end

local function current_text(line)
  return string.format('%d %d %d %d %d %d %d', line.window, line.weight, line.tier, line.rpm, line.tpm, line.in_flight,
    line.cost)
end

-- The rest of what a tactic sees.
local function complete_view(view) -- apart: reading
  function view.is_candidate(line)
    return view.may_serve(line)
  end

  -- All services, in the rule's order.
  function view.list()
    return view.lines_of(view.part)
  end

  -- Calls visit(line) for each candidate in the rule's order.
  function view.each(visit)
    local lines, may_serve = view.lines_of(view.part), view.may_serve
    view.load_all(view.part)
    for i = 1, #lines do
      local line = lines[i]
      if may_serve(line) then visit(line) end
    end
  end

  -- The candidates, the first after the service of that id first and itself last, cyclically, given to visit until it
  -- returns true.
  function view.each_after(id, visit)
    local text = view.services_text(view.part)
    local _, at = find_numbers(text, id)
    local has_turned, is_first = not at, true
    at = at or 2
    while true do
      local line, following = line_at(text, at)
      if line then
        view.found = line
        if view.may_serve(line) and visit(line) then return end
        if is_first then view.load_all(view.part) end
        if has_turned and line.id == id then return end
        at, is_first = following, false
      elseif has_turned then
        return
      else
        at, has_turned = 2, true
      end
    end
  end

  -- The first candidate after the service of that id, nil without one.
  function view.after(id)
    local found
    view.each_after(id, function(line)
      found = line
      return true
    end)
    return found
  end

  -- The candidate for which measure(line) is least, the first on ties.
  function view.least(measure)
    local best, least
    view.each(function(line)
      local value = measure(line)
      if not least or value < least then best, least = line, value end
    end)
    view.found = best
    return best
  end
end

-- What a tactic sees, one for all selections of a call: `view.part` and `view.may_serve` are set for each. Of a line,
-- which is a service of the partition, `may_serve(line)` says whether it is a candidate, `state_of(line)` gives its
-- state, `counts(line)` its window requests and tokens (reserved ones included). `load_all(part)` makes ready to look
-- at all of them. What is not needed while the cursor stays is made when it is asked for.
local function new_view(view)
  -- True when the cursor's service may be picked. Reads no other.
  function view.has_cursor()
    local current = view.part.current
    return current ~= nil and view.may_serve(current)
  end

  function view.cursor_counts()
    return view.counts(view.part.current)
  end

  return setmetatable(view, {__index = function(_, name)
    complete_view(view)
    return rawget(view, name)
  end})
end
