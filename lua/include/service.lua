-- include: window

-- The uuid of a service's provider.
local function provider_of(id)
  return string.match(id, '^[^:]*')
end

-- A service out of the values of the named fields, and what its provider says; absent numbers are 0, texts empty.
local function service_of(names, values, at)
  local service, loaded = {provider_text = values[at + #names + 1] or ''}, {}
  for i, name in ipairs(names) do
    local value = values[at + i]
    if name == 'windows' then
      service.windows = parse_windows(value)
    elseif name == 'minute' or name == 'breaker' then
      service[name] = value or ''
    else
      service[name] = tonumber(value or 0)
    end
    loaded[name] = service[name]
  end
  service.loaded = loaded
  return service
end

-- Loads the named fields of services that the cache has not, fifty at a time.
local function load_services(cache, key, ids, names)
  local missing = {}
  for _, id in ipairs(ids) do
    if not cache[id] then missing[#missing + 1] = id end
  end
  for first = 1, #missing, 50 do
    local fields, last = {}, math.min(first + 49, #missing)
    for i = first, last do
      local id = missing[i]
      for _, name in ipairs(names) do fields[#fields + 1] = name .. ':' .. id end
      fields[#fields + 1] = 'provider:' .. provider_of(id)
    end
    local values = redis.call('HMGET', key, unpack(fields))
    for i = first, last do cache[missing[i]] = service_of(names, values, (i - first) * (#names + 1)) end
  end
end

-- One service, loaded once a call.
local function load_service(cache, key, id, names)
  if not cache[id] then load_services(cache, key, {id}, names) end
  return cache[id]
end

-- Writes back what changed of the services that did.
local function save_services(cache, key, names)
  for id, service in pairs(cache) do
    if service.is_changed then
      local set, loaded = {}, service.loaded
      for _, name in ipairs(names) do
        local value = service[name]
        if name == 'windows' then
          value = windows_text(value)
        elseif value == loaded[name] then
          value = nil
        elseif name ~= 'minute' and name ~= 'breaker' then
          value = whole(value)
        end
        if value then
          set[#set + 1] = name .. ':' .. id
          set[#set + 1] = value
        end
      end
      if #set > 0 then redis.call('HSET', key, unpack(set)) end
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
