-- Takes the candidate with the fewest requests in flight; on ties the first after the cursor.
local function least_in_flight(turn, view)
  local best, least
  view.each_after(turn.cursor, function(line)
    local in_flight = view.state_of(line).in_flight
    if not least or in_flight < least then best, least = line, in_flight end
  end)
  if not best then return nil end
  return best.id, best.id == turn.cursor and turn.streak + 1 or 1, 'least'
end
