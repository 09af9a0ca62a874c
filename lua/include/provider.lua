-- include: number

-- A provider's limits in the pool and its services' breaker numbers, kept as text
-- `rpm tpm in_flight failures ratio_permille min_requests window_ms open_ms successes`.

-- The uuid of a service's provider.
local function provider_of(id)
  return string.match(id, '^[^:]*')
end

-- The breaker numbers of a loaded service's provider, nil when none are known. Read once a call.
local function provider_numbers(service)
  local meter = service.meter
  if meter.numbers then return meter.numbers end
  local failures, ratio, least, window, open, successes = string.match(meter.provider_text,
    '^%-?%d+ %-?%d+ %-?%d+ (%d+) (%d+) (%d+) (%d+) (%d+) (%d+)$')
  if not failures then return nil end
  local numbers = {
    failures = failures + 0, ratio_permille = ratio + 0, min_requests = least + 0, window_ms = window + 0,
    open_ms = open + 0, successes = successes + 0,
  }
  meter.numbers = numbers
  return numbers
end

-- The limits that a meter is held against, as the first numbers of its provider.
local function provider_limits(meter) -- apart: limits
  if not meter.limits then
    local rpm, tpm, in_flight = string.match(meter.provider_text, '^(-?%d+) (-?%d+) (-?%d+) ')
    meter.limits = {rpm = rpm + 0, tpm = tpm + 0, in_flight = in_flight + 0}
  end
  return meter.limits
end
