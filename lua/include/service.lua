-- include: window

-- The uuid of a service's provider.
local function provider_of(id)
  return string.match(id, '^[^:]*')
end

-- Loads the named fields of a service once a call, and what its provider says; absent numbers are 0, texts empty.
local function load_service(cache, key, id, names)
  local service = cache[id]
  if service then return service end
  local fields, count = {}, #names
  for i, name in ipairs(names) do fields[i] = name .. ':' .. id end
  fields[count + 1] = 'provider:' .. provider_of(id)
  local values = redis.call('HMGET', key, unpack(fields))
  service = {provider_text = values[count + 1] or ''}
  local loaded = {}
  for i, name in ipairs(names) do
    if name == 'windows' then
      service.windows = parse_windows(values[i])
    elseif name == 'minute' or name == 'breaker' then
      service[name] = values[i] or ''
    else
      service[name] = tonumber(values[i] or 0)
    end
    loaded[name] = service[name]
  end
  service.loaded = loaded
  cache[id] = service
  return service
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
