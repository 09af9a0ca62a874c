-- Draws by weight; all weights zero means uniform. `draw` is a whole number in [0, 2^32). Streak 0.
local function random(_, view, draw)
  local services, total = {}, 0
  view.each(function(line)
    services[#services + 1] = line
    total = total + line.weight
  end)
  if #services == 0 then return nil end
  if total == 0 then return services[math.floor(draw * #services / 4294967296) + 1].id, 0, 'draw' end
  local left = math.floor(draw * total / 4294967296)
  for _, line in ipairs(services) do
    left = left - line.weight
    if left < 0 then return line.id, 0, 'draw' end
  end
end
