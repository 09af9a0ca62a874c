-- Stays below both thresholds of the window, then takes the candidate with the least requests * 10 + tokens.
local function hybrid(turn, view)
  if view.has_cursor() then
    local requests, tokens = view.cursor_counts()
    if requests < turn.params.request_threshold and tokens < turn.params.token_threshold then
      return turn.cursor, turn.streak + 1, 'threshold'
    end
  end
  local line = view.least(function(candidate)
    local requests, tokens = view.counts(candidate)
    return requests * 10 + tokens
  end)
  if not line then return nil end
  return line.id, line.id == turn.cursor and turn.streak + 1 or 1, 'least'
end
