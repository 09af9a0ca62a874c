-- Draws by weight; all weights zero means uniform. `draw` is a whole number in [0, 2^32). Streak 0.
local function random(_, view, draw)
  local services, total = {}, 0
  view.each(function(service)
    services[#services + 1] = service
    total = total + service.weight
  end)
  if #services == 0 then return nil end
  if total == 0 then return services[math.floor(draw * #services / 4294967296) + 1].id, 0, 'draw' end
  local left = math.floor(draw * total / 4294967296)
  for _, service in ipairs(services) do
    left = left - service.weight
    if left < 0 then return service.id, 0, 'draw' end
  end
end
