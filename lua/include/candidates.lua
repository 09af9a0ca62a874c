-- The services of a partition, and the candidates of one selection among them, read no further than the tactic asks.

-- `window weight tier rpm tpm in_flight cost` as a line's numbers.
local LINE = '(%d+) (%d+) (%d+) (-?%d+) (-?%d+) (-?%d+) (%d+)'
local CURRENT_LINE, SERVICE_LINE = '^' .. LINE .. '$', '(%d) ' .. LINE .. ' ([^\n]+)\n'

local function service_line(id, is_active, window, weight, tier, rpm, tpm, in_flight, cost)
  return {
    id = id, is_active = is_active, window = tonumber(window), weight = tonumber(weight), tier = tonumber(tier),
    rpm = tonumber(rpm), tpm = tonumber(tpm), in_flight = tonumber(in_flight), cost = tonumber(cost),
  }
end

local function parse_services(text)
  local list = {}
  for active, window, weight, tier, rpm, tpm, in_flight, cost, id in string.gmatch(text, SERVICE_LINE) do
    list[#list + 1] = service_line(id, active == '1', window, weight, tier, rpm, tpm, in_flight, cost)
  end
  return list
end

-- The cursor's line, nil when it stands on nothing that is active.
local function parse_current(id, text)
  if text == '' then return nil end
  return service_line(id, true, string.match(text, CURRENT_LINE))
end

local function current_text(line)
  local values = {line.window, line.weight, line.tier, line.rpm, line.tpm, line.in_flight, line.cost}
  for i, value in ipairs(values) do values[i] = whole(value) end
  return table.concat(values, ' ')
end

-- What a tactic sees. `list(all)` gives all services, and with `all` makes ready to look at each; `may_serve(line)`
-- says which are candidates, `state_of(line)` gives a service's state, `counts(line)` its window requests and tokens
-- (reserved ones included). `current` is the cursor's line.
local function view_of(current, list, may_serve, state_of, counts)
  local view = {state_of = state_of, counts = counts, list = list}

  -- True when the cursor's service may be picked. Reads no other.
  function view.has_cursor()
    return current ~= nil and may_serve(current)
  end

  function view.cursor_counts()
    return counts(current)
  end

  function view.is_candidate(line)
    return may_serve(line)
  end

  -- Calls visit(line) for each candidate in the rule's order.
  function view.each(visit)
    for _, line in ipairs(list(true)) do
      if may_serve(line) then visit(line) end
    end
  end

  -- The candidates, the first after the service of that id first and itself last, cyclically, given to visit until it
  -- returns true.
  function view.each_after(id, visit)
    local services, from = list(), 0
    for i, line in ipairs(services) do
      if line.id == id then from = i end
    end
    for step = 1, #services do
      local line = services[(from + step - 1) % #services + 1]
      if may_serve(line) and visit(line) then return end
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
    return best
  end

  return view
end
