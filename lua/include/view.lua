-- include: partition
-- include: service

-- The rest of what a tactic sees.
local function complete_view(view) -- apart: reading
  function view.is_candidate(line)
    return view.may_serve(line)
  end

  -- All services, in the rule's order.
  function view.list()
    return lines_of(view.part)
  end

  -- Calls visit(line) for each candidate in the rule's order.
  function view.each(visit)
    local lines, may_serve = lines_of(view.part), view.may_serve
    load_all(view.state, view.part, lines)
    for i = 1, #lines do
      local line = lines[i]
      if may_serve(line) then visit(line) end
    end
  end

  -- The candidates, the first after the service of that id first and itself last, cyclically, given to visit until it
  -- returns true: that line, nil without one. Without visit it is the first: `after(id)`.
  function view.each_after(id, visit)
    local part, may_serve = view.part, view.may_serve
    local at = place_behind(part, id)
    local has_turned, is_first = not at, true
    at = at or 2
    while true do
      local line = line_in_place(part, at)
      if line then
        view.found = line
        if may_serve(line) and (not visit or visit(line)) then return line end
        if is_first then load_all(view.state, part, lines_of(part)) end
        if has_turned and line.id == id then return nil end
        at, is_first = line.following, false
      elseif has_turned then
        return nil
      else
        at, has_turned = 2, true
      end
    end
  end
  view.after = view.each_after

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
-- state, `counts(line)` its window requests and tokens (reserved ones included). What is not needed while the cursor
-- stays is made when it is asked for.
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
