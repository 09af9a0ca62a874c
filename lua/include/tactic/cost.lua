-- Takes the cheapest candidate; among equally cheap ones the one with the fewest window tokens, then the first.
local function cost(turn, view)
  local best, least_tokens
  view.each(function(line)
    if not best or line.cost <= best.cost then
      local _, tokens = view.counts(line)
      if not best or line.cost < best.cost or tokens < least_tokens then best, least_tokens = line, tokens end
    end
  end)
  if not best then return nil end
  return best.id, best.id == turn.cursor and turn.streak + 1 or 1, 'cheapest'
end
