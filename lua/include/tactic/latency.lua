-- Of two candidates drawn at random takes the one that should answer sooner: time to the first token and for
-- expected_output tokens, for each request in flight and this one. Streak 0.
local function latency(turn, view, draw)
  local services = {}
  view.each(function(line) services[#services + 1] = line end)
  local count = #services
  if count == 0 then return nil end
  local i = math.floor(math.floor(draw / 65536) * count / 65536)
  local j = math.floor((draw % 65536) * (count - 1) / 65536)
  if j >= i then j = j + 1 end
  local function score(line)
    local state = view.state_of(line)
    return (state.first_token + state.per_token * turn.params.expected_output) * (state.in_flight + 1)
  end
  local line = services[i + 1]
  if count > 1 and score(services[j + 1]) < score(line) then line = services[j + 1] end
  return line.id, 0, 'fastest'
end
