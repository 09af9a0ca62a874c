-- Gives each candidate exactly its share by weight, evenly spread: every turn each gains its weight, and who has the
-- most is picked and pays the sum. All weights zero means equal ones. The partition's memory keeps what each has.
local function weighted_round_robin(turn, view)
  local services, has, weights = view.list(), {}, 0
  for value in string.gmatch(turn.memory, '-?%d+') do has[#has + 1] = tonumber(value) end
  if #has ~= #services then
    for i = 1, #services do has[i] = 0 end
  end
  view.each(function(line) weights = weights + line.weight end)
  local best, total = nil, 0
  for i, line in ipairs(services) do
    if view.is_candidate(line) then
      local weight = weights > 0 and line.weight or 1
      has[i], total = has[i] + weight, total + weight
      if not best or has[i] > has[best] then best = i end
    end
  end
  if not best then return nil end
  has[best] = has[best] - total
  for i, value in ipairs(has) do has[i] = whole(value) end
  local id = services[best].id
  return id, id == turn.cursor and turn.streak + 1 or 1, 'turn', table.concat(has, ' ')
end
