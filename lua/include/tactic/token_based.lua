-- Stays below token_threshold window tokens, then takes the candidate with the fewest.
local function token_based(part, view)
  if view.has_cursor() then
    local _, tokens = view.cursor_counts()
    if tokens < part.token_threshold then return part.cursor, part.streak + 1, 'threshold' end
  end
  local service = view.least(function(_, tokens) return tokens end)
  if not service then return nil end
  return service.id, service.id == part.cursor and part.streak + 1 or 1, 'least'
end
