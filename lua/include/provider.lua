-- include: service

-- A provider's limits in the pool and its services' breaker numbers, and the meter that its limits are held against.
local meter_fields = {'minute', 'in_flight', 'reserved'}

-- True when the provider of a loaded service has limits. Costs no reading of its other numbers.
local function has_provider_limits(service)
  local text = service.provider_text
  return text ~= '' and string.sub(text, 1, 6) ~= '0 0 0 '
end

-- The numbers of a loaded service's provider, false when none are known. Read once a call.
local function provider_numbers(cache, service)
  local text = service.provider_text
  if cache[text] == nil then
    local rpm, tpm, in_flight, failures, ratio, least, window, open, successes = string.match(text,
      '^(-?%d+) (-?%d+) (-?%d+) (%d+) (%d+) (%d+) (%d+) (%d+) (%d+)$')
    cache[text] = rpm and {
      rpm = tonumber(rpm), tpm = tonumber(tpm), in_flight = tonumber(in_flight), failures = tonumber(failures),
      ratio_permille = tonumber(ratio), min_requests = tonumber(least), window_ms = tonumber(window),
      open_ms = tonumber(open), successes = tonumber(successes),
    } or false
  end
  return cache[text]
end
