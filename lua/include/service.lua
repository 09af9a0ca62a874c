-- include: minute
-- include: provider
-- include: window

-- The services of a pool, read once a call and written once. `service:<id>` is what picks change, `totals:<id>` what
-- only the ends of attempts do, `meter:<provider>` what a provider's limits are held against.

local SERVICE = '^(-?%d+) (-?%d+) (-?%d+) (%d+) (%d+) (%d+) (%d+)|([^|]*)|([^|]*)|(.*)$'
local NEW_SERVICE, NEW_TOTALS = '0 0 0 0 0 0 0|||', '0 0 0 0 0 0 0 0 0 0 0 0'
local TOTALS = '^(-?%d+) (-?%d+) (-?%d+) (-?%d+) (-?%d+) (-?%d+) (-?%d+) (-?%d+) (-?%d+) (-?%d+) (-?%d+) (-?%d+)$'

-- `key` is the hash; totals are read and written where they are asked for.
local function open_services(key, has_totals)
  return {key = key, has_totals = has_totals, services = {}, meters = {}}
end

-- `totals` is an array, of texts for what has not changed, where they were asked for; false where they were not.
local REQUESTS, FAILURES, INPUT, OUTPUT, CACHED, CACHE_CREATION = 1, 2, 3, 4, 5, 6
local REASONING, LOST, LOST_TOKENS, ABANDONED, LAST_USED, CLEARED = 7, 8, 9, 10, 11, 12

local function parse_service(text, totals)
  local in_flight, reserved, picks, cooldown, first_token, per_token, measured, windows, minute, breaker =
    string.match(text, SERVICE)
  return {
    in_flight = in_flight + 0, reserved = reserved + 0, picks = picks + 0, cooldown = cooldown + 0,
    first_token = first_token + 0, per_token = per_token + 0, measured = measured + 0,
    windows = parse_windows(windows), minute_text = minute, breaker_text = breaker, breaker = false, meter = false,
    totals = totals, is_changed = false, is_rolled = false,
  }
end

-- A provider's meter; without limits it counts nothing.
local function parse_meter(text, provider_text)
  local in_flight, reserved, minute = 0, 0, ''
  if text then in_flight, reserved, minute = string.match(text, '^(-?%d+) (-?%d+)|(.*)$') end
  return {
    in_flight = in_flight + 0, reserved = reserved + 0, minute_text = minute,
    provider_text = provider_text, numbers = false, limits = false, is_changed = false,
    has_limits = provider_text ~= '' and string.sub(provider_text, 1, 6) ~= '0 0 0 ',
  }
end

-- Notes the fields of those services that have not been read, and behind them what else is read of each. A provider
-- of several is read once: with the service that stands in its place until then.
local function ask_for(pool_services, ids, has_totals, fields, missing)
  local services, meters = pool_services.services, pool_services.meters
  for i = 1, #ids do
    local id = ids[i]
    if not services[id] then
      local provider, count = provider_of(id), #fields
      services[id], missing[#missing + 1] = provider, id
      fields[count + 1] = 'service:' .. id
      if has_totals then
        count = count + 1
        fields[count + 1] = 'totals:' .. id
      end
      if not meters[provider] then
        meters[provider] = id
        fields[count + 2], fields[count + 3] = 'provider:' .. provider, 'meter:' .. provider
      end
    end
  end
  return #missing
end

-- Reads those of the services that have not been read, and `more` fields of the hash, whose values come back first;
-- of the `bare` services no totals.
local function load_services(pool_services, ids, more, bare)
  local fields, missing = more or {}, {}
  local at = #fields + 1
  local full = ask_for(pool_services, ids, pool_services.has_totals, fields, missing)
  if bare then ask_for(pool_services, bare, false, fields, missing) end
  if #fields == 0 then return fields end
  local values, services, meters = redis.call('HMGET', pool_services.key, unpack(fields)), pool_services.services,
    pool_services.meters
  for i = 1, #missing do
    local id = missing[i]
    local provider, text, totals = services[id], values[at] or NEW_SERVICE, false
    if i <= full and pool_services.has_totals then
      at = at + 1
      totals = {string.match(values[at] or NEW_TOTALS, TOTALS)}
    end
    local service = parse_service(text, totals)
    services[id], at = service, at + 1
    if meters[provider] == id then
      meters[provider] = parse_meter(values[at + 1], values[at] or '')
      at = at + 2
    end
    service.meter = meters[provider]
  end
  return values
end

local function load_service(pool_services, id)
  local service = pool_services.services[id]
  if service then return service end
  load_services(pool_services, {id})
  return pool_services.services[id]
end

local function breaker_text(service)
  local breaker = service.breaker
  if not breaker then return service.breaker_text end
  local text = string.format('%d %d %d %d %d %d %d %d %d', breaker.state, breaker.consecutive, breaker.start,
    breaker.requests, breaker.failed, breaker.opens, breaker.successes, breaker.until_ms, breaker.probe)
  return text ~= '0 0 0 0 0 0 0 0 0' and text or ''
end

local function totals_text(totals)
  return string.format('%d %d %d %d %d %d %d %d %d %d %d %d', unpack(totals))
end

local function kept_minute(used)
  local minute = used.minute
  return minute and minute.is_counted and minute_text(minute) or used.minute_text
end

-- The fields and values of what has changed.
local function changed_fields(pool_services)
  local set, count = {}, 0
  for id, service in pairs(pool_services.services) do
    if service.is_changed then
      set[count + 1] = 'service:' .. id
      set[count + 2] = string.format('%d %d %d %d %d %d %d|', service.in_flight, service.reserved, service.picks,
        service.cooldown, service.first_token, service.per_token, service.measured)
        .. windows_text(service.windows) .. '|' .. kept_minute(service) .. '|' .. breaker_text(service)
      count = count + 2
      if service.totals then
        set[count + 1] = 'totals:' .. id
        set[count + 2] = totals_text(service.totals)
        count = count + 2
      end
    end
  end
  for provider, meter in pairs(pool_services.meters) do
    if meter.is_changed then
      set[count + 1] = 'meter:' .. provider
      set[count + 2] = string.format('%d %d|', meter.in_flight, meter.reserved) .. kept_minute(meter)
      count = count + 2
    end
  end
  return set
end

-- Counters as an event tells them, given as text; then windows, minute and breaker, behind a `|` each.
local function with_texts(service, counters) -- apart: rare
  return counters .. '|' .. windows_text(service.windows) .. '|' .. kept_steps(service) .. '|' .. breaker_text(service)
end

-- A service as an event of a pick tells it: `in_flight reserved picks`.
local function pick_text(service) -- apart: rare
  return with_texts(service, string.format('%d %d %d', service.in_flight, service.reserved, service.picks))
end

-- Loads all services of a partition at once, for who looks at each.
local function load_all(pool_services, part, lines) -- apart: reading
  if part.is_loaded then return end
  local ids = {}
  for i = 1, #lines do ids[i] = lines[i].id end
  load_services(pool_services, {}, nil, ids)
  part.is_loaded = true
end
