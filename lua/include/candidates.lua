-- The candidates of one selection, read no further than the tactic asks. `part` is the partition's state, `excluded` a
-- set of service ids, `counts(id, window)` gives a service's window requests and tokens.
local function parse_services(text)
  local list = {}
  for active, window, weight, id in string.gmatch(text, '(%d) (%d+) (%d+) ([^\n]+)\n') do
    list[#list + 1] = {id = id, is_active = active == '1', window = tonumber(window), weight = tonumber(weight)}
  end
  return list
end

local function candidates_of(part, excluded, load_list, counts)
  local view = {}

  local function list()
    part.list = part.list or parse_services(load_list())
    return part.list
  end

  local function may_serve(service)
    return service.is_active and not excluded[service.id]
  end

  -- True when the cursor's service may be picked. Costs no reading.
  function view.has_cursor()
    return part.window > 0 and not excluded[part.cursor]
  end

  -- Window requests and tokens (reserved ones included) of the cursor's service.
  function view.cursor_counts()
    return counts(part.cursor, part.window)
  end

  -- Calls visit(service) for each candidate in the rule's order.
  function view.each(visit)
    for _, service in ipairs(list()) do
      if may_serve(service) then visit(service, counts) end
    end
  end

  -- The first candidate after the service of that id in the rule's order, cyclically, itself last; nil without one.
  function view.after(id)
    local services, from = list(), 0
    for i, service in ipairs(services) do
      if service.id == id then from = i end
    end
    for step = 1, #services do
      local service = services[(from + step - 1) % #services + 1]
      if may_serve(service) then return service end
    end
    return nil
  end

  -- The candidate for which measure(requests, tokens) is least, the first on ties.
  function view.least(measure)
    local best, least
    view.each(function(service)
      local value = measure(counts(service.id, service.window))
      if not least or value < least then best, least = service, value end
    end)
    return best
  end

  -- The service of that id, candidate or not.
  function view.find(id)
    for _, service in ipairs(list()) do
      if service.id == id then return service end
    end
    return nil
  end

  return view
end
