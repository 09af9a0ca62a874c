-- include: window

-- Loads the named fields of a service once a call; absent numbers are 0, absent texts empty.
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
    elseif name == 'minute' or name == 'breaker' then
      service[name] = values[i] or ''
    else
      service[name] = tonumber(values[i] or 0)
    end
  end
  cache[id] = service
  return service
end

-- Writes back the services that changed; minute and breaker are rare, and written only when they changed themselves.
local function save_services(cache, key, names)
  for id, service in pairs(cache) do
    if service.is_changed then
      local set = {}
      for _, name in ipairs(names) do
        local value
        if name == 'windows' then
          value = windows_text(service.windows)
        elseif name == 'minute' then
          value = service.is_minute_changed and service.minute
        elseif name == 'breaker' then
          value = service.is_breaker_changed and service.breaker
        else
          value = whole(service[name])
        end
        if value then
          set[#set + 1] = name .. ':' .. id
          set[#set + 1] = value
        end
      end
      redis.call('HSET', key, unpack(set))
    end
  end
end

-- The named counters as an event tells them, joined by blanks; then the texts, behind a `|` each.
local function counters_text(service, names)
  local values = {}
  for i, name in ipairs(names) do values[i] = whole(service[name]) end
  return table.concat(values, ' ') .. '|' .. windows_text(service.windows) .. '|' .. service.minute .. '|'
    .. service.breaker
end
