-- include: window

-- Loads the named fields of a service once a call; absent numbers are 0.
local function load_service(cache, key, id, names)
  local service = cache[id]
  if service then return service end
  local fields = {}
  for i, name in ipairs(names) do fields[i] = name .. ':' .. id end
  local values = redis.call('HMGET', key, unpack(fields))
  service = {}
  for i, name in ipairs(names) do
    if name == 'windows' then
      service.windows = parse_windows(values[i])
    else
      service[name] = tonumber(values[i] or 0)
    end
  end
  cache[id] = service
  return service
end

-- Writes back the services that changed.
local function save_services(cache, key, names)
  for id, service in pairs(cache) do
    if service.is_changed then
      local set = {}
      for _, name in ipairs(names) do
        set[#set + 1] = name .. ':' .. id
        set[#set + 1] = name == 'windows' and windows_text(service.windows) or whole(service[name])
      end
      redis.call('HSET', key, unpack(set))
    end
  end
end

-- The named counters as an event tells them, joined by blanks; the windows, which come first in `names`, behind a `|`.
local function counters_text(service, names)
  local values = {}
  for i = 2, #names do values[#values + 1] = whole(service[names[i]]) end
  return table.concat(values, ' ') .. '|' .. windows_text(service.windows)
end
