-- Stays for request_threshold consecutive picks, then takes the next candidate with streak 1.
local function round_robin(part, view)
  if view.has_cursor() and part.streak < part.request_threshold then
    return part.cursor, part.streak + 1, 'streak'
  end
  local service = view.after(part.cursor)
  return service and service.id, 1, 'next'
end
