-- include: service

-- A provider's limits in the pool and its services' breaker numbers, and the meter that its limits are held against.
local meter_fields = {'minute', 'in_flight', 'reserved'}

local function provider_of(service_id)
  return string.match(service_id, '^[^:]*')
end

-- The provider's numbers, false when none are known. Read once a call.
local function load_provider(cache, key, id)
  if cache[id] == nil then
    local text = redis.call('HGET', key, 'provider:' .. id)
    local rpm, tpm, in_flight, failures, ratio, least, window, open, successes = string.match(text or '',
      '^(-?%d+) (-?%d+) (-?%d+) (%d+) (%d+) (%d+) (%d+) (%d+) (%d+)$')
    cache[id] = rpm and {
      rpm = tonumber(rpm), tpm = tonumber(tpm), in_flight = tonumber(in_flight), failures = tonumber(failures),
      ratio_permille = tonumber(ratio), min_requests = tonumber(least), window_ms = tonumber(window),
      open_ms = tonumber(open), successes = tonumber(successes),
    } or false
  end
  return cache[id]
end
