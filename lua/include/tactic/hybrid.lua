-- Stays below both thresholds of the window, then takes the candidate with the least requests * 10 + tokens.
local function hybrid(part, view)
  if view.has_cursor() then
    local requests, tokens = view.cursor_counts()
    if requests < part.request_threshold and tokens < part.token_threshold then
      return part.cursor, part.streak + 1, 'threshold'
    end
  end
  local service = view.least(function(requests, tokens) return requests * 10 + tokens end)
  if not service then return nil end
  return service.id, service.id == part.cursor and part.streak + 1 or 1, 'least'
end
