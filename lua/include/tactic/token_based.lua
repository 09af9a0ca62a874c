-- Stays below token_threshold window tokens, then takes the candidate with the fewest.
local function token_based(turn, view)
  if view.has_cursor() then
    local _, tokens = view.cursor_counts()
    if tokens < turn.params.token_threshold then return turn.cursor, turn.streak + 1, 'threshold' end
  end
  local line = view.least(function(candidate)
    local _, tokens = view.counts(candidate)
    return tokens
  end)
  if not line then return nil end
  return line.id, line.id == turn.cursor and turn.streak + 1 or 1, 'least'
end
