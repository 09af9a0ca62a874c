-- Stays for request_threshold consecutive picks, then takes the next candidate with streak 1.
local function round_robin(turn, view)
  if turn.streak < turn.params.request_threshold and view.has_cursor() then
    return turn.cursor, turn.streak + 1, 'streak'
  end
  local line = view.after(turn.cursor)
  return line and line.id, 1, 'next'
end
