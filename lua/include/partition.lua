-- include: candidates
-- include: number

-- A partition as select reads it, and what a pick changes of it.
local function load_partition(key, id)
  local values = redis.call('HMGET', key, 'tactic:' .. id, 'params:' .. id, 'cursor:' .. id, 'line:' .. id,
    'streak:' .. id, 'top:' .. id, 'tier:' .. id, 'hold:' .. id, 'memory:' .. id)
  local part = {
    key = key, id = id, tactic = values[1], params_text = values[2] or '', params = {}, cursor = values[3] or '',
    streak = tonumber(values[5] or 0), top = tonumber(values[6] or -1), tier = tonumber(values[7] or -1),
    hold = tonumber(values[8] or 0), memory = values[9] or '',
  }
  part.current = parse_current(part.cursor, values[4] or '')
  part.loaded = part.current
  for name, value in string.gmatch(part.params_text, '([%l_]+) (%d+)') do part.params[name] = tonumber(value) end
  return part
end

-- All its services, as text and as lines; read when they are first asked for.
local function services_text(part)
  part.services_text = part.services_text or redis.call('HGET', part.key, 'services:' .. part.id) or ''
  return part.services_text
end

local function lines_of(part)
  part.lines = part.lines or parse_services(services_text(part))
  return part.lines
end

local function find_line(part, id)
  if part.current and id == part.cursor then return part.current end
  for _, line in ipairs(lines_of(part)) do
    if line.id == id then return line end
  end
  return nil
end

-- True when the partition tries nothing that a cooldown or a breaker keeps back.
local function refuses(part)
  return redis.call('HGET', part.key, 'refuses:' .. part.id) == '1'
end

-- The tier that serves; nil in a partition of one tier.
local function serving_tier(part)
  if part.top < 0 then return nil end
  return part.tier >= 0 and part.tier or part.top
end

local function of_tier(may_serve, tier)
  return function(line) return line.tier == tier and may_serve(line) end
end

-- The least tier of those that may serve, nil without one, and whether one of `tier` may.
local function least_tier(part, may_serve, tier)
  local least, has_tier = nil, false
  for _, line in ipairs(lines_of(part)) do
    if may_serve(line) then
      least = math.min(least or line.tier, line.tier)
      has_tier = has_tier or line.tier == tier
    end
  end
  return least, has_tier
end

-- Adds to the fields of an HSET what a pick has changed.
local function save_partition(part, set)
  local changed = {streak = whole(part.streak)}
  if part.current ~= part.loaded then changed.cursor, changed.line = part.cursor, current_text(part.current) end
  if part.top >= 0 then changed.tier, changed.hold = whole(part.tier), whole(part.hold) end
  if part.memory ~= '' then changed.memory = part.memory end
  for name, value in pairs(changed) do
    set[#set + 1] = name .. ':' .. part.id
    set[#set + 1] = value
  end
end
