-- Picks a service for each of 1 to 64 selections of one pool, in order, as if each were a call of its own.
-- KEYS[1] services      the pool's services
-- KEYS[2] partitions    the pool's place in its history, rules and partitions
-- KEYS[3] holdings      of the asking worker
-- KEYS[4] leases        of all workers
-- KEYS[5] decisions     the stream of events
-- KEYS[6…] pins         of the sessions, one for each selection with an affinity, in their order
-- ARGV[1] now_ms        0 for the server's clock
-- ARGV[2] worker        who asks
-- ARGV[3] epoch         the highest epoch and
-- ARGV[4] position      position in it that the worker has seen, 0 0 for none
-- ARGV[5] lease_ms      how long the worker's lease is renewed for
-- ARGV[6…] selections   number, rule, partition, revision, draw, reserved, deadline_ms (from now), affinity_ms (so long
--   the session stays pinned, 0 without one), only (the one service that may be picked, '' for any), excluded (how
--   many) and their ids
-- Returns an array for each selection, in order:
--   {'pick', service, reason, seq, epoch, position, streak, is_switch}, {'none', cause, retry_ms}: the cause is one of
--   inactive, tried, budget, limited, broken and cooling, retry_ms -1 for never; {'stale', revision}: a later revision
--   stands, {'define', revision}: this one is not known here, {'abandoned'}: the name was given up;
--   then {'pool', epoch, position, lost}.
-- include: clock
-- include: pool
-- include: service
-- include: provider
-- include: breaker
-- include: limits
-- include: partition
-- include: tactic/*

local services_key, partitions_key, holdings_key = KEYS[1], KEYS[2], KEYS[3]
local leases_key, decisions_key = KEYS[4], KEYS[5]
local counters = {'in_flight', 'reserved', 'picks'}
local read_fields = {
  'windows', 'minute', 'breaker', 'in_flight', 'reserved', 'picks', 'cooldown', 'first_token', 'per_token',
}
local written_fields = {'windows', 'minute', 'breaker', 'in_flight', 'reserved', 'picks'}
local RETRY_COST, MOST_BUDGET, PROMOTION_HOLD_MS = 1000, 100000, 60000

local selections, names, pins = {}, {}, 0
local at = 6
while at <= #ARGV do
  local selection = {
    number = ARGV[at], rule = ARGV[at + 1], partition = ARGV[at + 2], revision = to_whole(ARGV[at + 3], 1),
    draw = to_whole(ARGV[at + 4], 0), reserved = to_whole(ARGV[at + 5], 0), deadline_ms = to_whole(ARGV[at + 6], 0),
    affinity_ms = to_whole(ARGV[at + 7], 0), only = ARGV[at + 8], excluded = {}, statuses = {}, waits = {},
  }
  local excluded = to_whole(ARGV[at + 9], 0)
  if not (to_whole(selection.number, 1) and selection.revision and selection.draw and selection.draw < 4294967296
      and selection.reserved and selection.deadline_ms and selection.affinity_ms and excluded
      and at + 9 + excluded <= #ARGV) then
    return redis.error_reply('BALANCER select: selection ' .. (#selections + 1) .. ' is malformed')
  end
  for i = at + 10, at + 9 + excluded do selection.excluded[ARGV[i]] = true end
  selection.is_retry = excluded > 0
  if selection.affinity_ms > 0 then
    pins = pins + 1
    selection.pin_key = KEYS[5 + pins]
  end
  selections[#selections + 1] = selection
  names[#names + 1] = selection.number
  at = at + 10 + excluded
end
local now_arg, seen_epoch, seen_position = to_whole(ARGV[1], 0), to_whole(ARGV[3], 0), to_whole(ARGV[4], 0)
local lease_ms = to_whole(ARGV[5], 1)
if #selections < 1 or #selections > 64 then return redis.error_reply('BALANCER select: 1 to 64 selections') end
if not (now_arg and seen_epoch and seen_position and lease_ms) then
  return redis.error_reply('BALANCER select: malformed argument')
end
if pins ~= #KEYS - 5 then return redis.error_reply('BALANCER select: one pin for each affinity') end

local now = clock(now_arg)
local pool = open_pool(partitions_key, decisions_key, seen_epoch, seen_position, now)
local known = redis.call('HMGET', holdings_key, unpack(names))
local services, meters, providers, rules, parts, held, taken, answers = {}, {}, {}, {}, {}, {}, {}, {}

local function load_rule(name)
  if not rules[name] then
    local values = redis.call('HMGET', partitions_key, 'revision:' .. name, 'seq:' .. name,
      'retry_permille:' .. name, 'budget:' .. name)
    local retry_permille = tonumber(values[3] or 0)
    rules[name] = {
      revision = tonumber(values[1] or 0), seq = tonumber(values[2] or 0), retry_permille = retry_permille,
      budget = tonumber(values[4] or (retry_permille > 0 and MOST_BUDGET or 0)),
    }
  end
  return rules[name]
end

local function part_of(id)
  parts[id] = parts[id] or load_partition(partitions_key, id)
  return parts[id]
end

local function state_of(line)
  return load_service(services, services_key, line.id, read_fields)
end

-- Loads all services of a partition at once, for who looks at each.
local function load_all(part)
  local ids = {}
  for i, line in ipairs(lines_of(part)) do ids[i] = line.id end
  load_services(services, services_key, ids, read_fields)
end

local function counts(line)
  local service = state_of(line)
  local requests, tokens = window_counts(service.windows, line.window, now)
  return requests, tokens + service.reserved
end

local function provider_at(line)
  return provider_numbers(providers, state_of(line))
end

local function meter_at(line)
  return load_service(meters, services_key, provider_of(line.id), meter_fields)
end

-- What keeps a service from serving: inactive, excluded, limited (with the wait), broken, cooling; '' for a candidate.
-- Looked up once for each selection.
local function find_status(selection, line)
  if not line.is_active then return 'inactive' end
  if selection.excluded[line.id] or (selection.only ~= '' and selection.only ~= line.id) then return 'excluded' end
  local service = state_of(line)
  local wait = limit_wait(line, service, selection.reserved, now)
  if has_provider_limits(service) then
    wait = longer(wait, limit_wait(provider_at(line), meter_at(line), selection.reserved, now))
  end
  if wait then return 'limited', wait end
  if is_open(service.breaker) and has_breaker(provider_at(line)) then return 'broken' end
  if service.cooldown > now then return 'cooling' end
  return ''
end

local function status_of(selection, line)
  local statuses = selection.statuses
  if not statuses[line.id] then statuses[line.id], selection.waits[line.id] = find_status(selection, line) end
  return statuses[line.id]
end

-- Chooses by the partition's tactic among those that may serve, on a copy of its state; nil when there is none.
local function choose(part, selection, may_serve)
  local turn = {
    cursor = part.cursor, current = part.current, streak = part.streak, params = part.params, memory = part.memory,
  }
  local function list(all)
    if all then load_all(part) end
    return lines_of(part)
  end
  local view = view_of(turn.current, list, may_serve, state_of, counts)
  if turn.cursor == '' then
    local first = view.after('')
    if not first then return nil end
    turn.cursor, turn.current, turn.streak = first.id, first, 0
    view = view_of(first, list, may_serve, state_of, counts)
  end
  local id, streak, reason, memory = tactic_table[part.tactic](turn, view, selection.draw)
  if not id then return nil end
  return {
    line = find_line(part, id), streak = streak, reason = reason, memory = memory or part.memory,
    tier = part.tier, hold = part.hold, view = view,
  }
end

-- The tactic's choice among the candidates of the tier that serves now. A lower one serves only while no higher has a
-- candidate, and for a minute at least.
local function choose_candidate(part, selection)
  local function may_serve(line) return status_of(selection, line) == '' end
  if part.top < 0 then return choose(part, selection, may_serve) end
  local tier, hold = serving_tier(part), part.hold
  local is_at_top = tier == part.top and part.current and part.current.tier == tier and may_serve(part.current)
  if not is_at_top then
    load_all(part)
    local least, has_tier = least_tier(part, may_serve, tier)
    if not least then return nil end
    if least > tier then
      tier, hold = least, now + PROMOTION_HOLD_MS
    elseif least < tier and (now >= hold or not has_tier) then
      tier = least
    end
  end
  local choice = choose(part, selection, of_tier(may_serve, tier))
  if choice then choice.tier, choice.hold = tier, hold end
  return choice
end

-- The first service in the rule's order whose half-open breaker nobody tries, nil without one.
local function find_probe(part, selection)
  local is_due_id = {}
  for until_ms, id in string.gmatch(pool.broken, '(%d+) ([^\n]+)\n') do is_due_id[id] = tonumber(until_ms) <= now end
  local tier = serving_tier(part)
  for _, line in ipairs(lines_of(part)) do
    if is_due_id[line.id] and (not tier or line.tier <= tier) and status_of(selection, line) == 'broken' then
      local service = state_of(line)
      if is_due(read_breaker(service.breaker), now) and service.cooldown <= now then return line end
    end
  end
  return nil
end

-- What a sampled pick saw, so that it can be checked by itself.
local function seen_by_tactic(part, view)
  local lines = {}
  for i, line in ipairs(view.list()) do
    local requests, tokens = counts(line)
    local service = state_of(line)
    lines[i] = table.concat({
      view.is_candidate(line) and 1 or 0, whole(requests), whole(tokens), whole(service.in_flight),
      whole(service.first_token), whole(service.per_token),
    }, ' ')
  end
  return {
    'params', part.params_text, 'memory', part.memory, 'services', services_text(part),
    'counts', table.concat(lines, '\n'),
  }
end

local function record_pick(selection, part, fields, sample)
  local excluded = {}
  for other in pairs(selection.excluded) do excluded[#excluded + 1] = other end
  local event = {
    'worker', ARGV[2], 'number', selection.number, 'rule', selection.rule, 'partition', selection.partition,
    'revision', whole(selection.revision), 'tactic', part.tactic, 'draw', whole(selection.draw),
    'reserved', whole(selection.reserved), 'deadline_ms', whole(now + selection.deadline_ms),
    'excluded', table.concat(excluded, '\n'), 'affinity_ms', whole(selection.affinity_ms), 'only', selection.only,
    'pin', selection.pin or '',
  }
  for _, list in ipairs({fields, sample}) do
    for _, value in ipairs(list) do event[#event + 1] = value end
  end
  record_event(pool, 'pick', event)
end

-- Counts a request on a service and its provider; which of their minutes counts it: 0 none, 1 the service's, 2 the
-- provider's, 3 both.
local function count_pick(selection, line, service)
  local metered = 0
  roll_windows(service.windows, now)
  for _, w in ipairs(service.windows) do w.requests = w.requests + 1 end
  service.in_flight = service.in_flight + 1
  service.reserved = service.reserved + selection.reserved
  service.picks = service.picks + 1
  service.is_changed = true
  if line.rpm ~= 0 or line.tpm ~= 0 then
    service.minute, metered = count_minute(service.minute, now, 1, 0), 1
  end
  if has_provider_limits(service) then
    local meter = meter_at(line)
    meter.minute = count_minute(meter.minute, now, 1, 0)
    meter.in_flight, meter.reserved = meter.in_flight + 1, meter.reserved + selection.reserved
    meter.is_changed, metered = true, metered + 2
  end
  return metered
end

-- Picks what was chosen: choice.line, .reason, .streak, .is_switch, .is_probe; choice.view if a tactic chose it.
local function take(selection, rule, part, choice)
  local line = choice.line
  local id, service = line.id, state_of(line)
  local is_recorded = advance(pool)
  local sample = is_recorded and pool.record == 'sampled' and choice.view and seen_by_tactic(part, choice.view) or {}
  local before = is_recorded and {part.cursor, part.streak, counters_text(service, counters)}
  local metered = count_pick(selection, line, service)
  local probe = 0
  if choice.is_probe then
    local breaker = read_breaker(service.breaker)
    breaker.probe, probe = pool.position, pool.position
    set_breaker(pool, service, id, breaker_text(breaker))
  end
  if choice.moves then
    part.cursor, part.current, part.streak, part.memory = id, line, choice.streak, choice.memory
    part.tier, part.hold, part.is_changed = choice.tier, choice.hold, true
  end
  local budget = math.min(MOST_BUDGET, rule.budget + (selection.is_retry and -RETRY_COST or rule.retry_permille))
  if budget ~= rule.budget then rule.budget, rule.is_budget_changed = budget, true end
  rule.seq = rule.seq + 1
  rule.is_changed = true
  taken[selection.number] = true
  held[#held + 1] = selection.number
  held[#held + 1] = table.concat({
    'h', whole(selection.reserved), whole(now + selection.deadline_ms), metered, whole(probe), id,
  }, ' ')
  if choice.pins then redis.call('SET', selection.pin_key, id, 'PX', whole(selection.affinity_ms)) end
  if before then
    record_pick(selection, part, {
      'service', id, 'reason', choice.reason, 'seq', whole(rule.seq), 'cursor', before[1], 'streak_before', before[2],
      'streak', choice.streak, 'is_switch', choice.is_switch, 'meters', metered,
      'before', before[3], 'after', counters_text(service, counters),
    }, sample)
  end
  return {'pick', id, choice.reason, rule.seq, pool.epoch, pool.position, choice.streak, choice.is_switch}
end

-- The service that the session is pinned to, when it may be picked. A limit or a cooldown passes, and the pin stands
-- meanwhile (selection.keeps_pin); all else ends it.
local function pinned(part, selection)
  selection.pin = redis.call('GET', selection.pin_key) or ''
  if selection.pin == '' then return nil end
  local line = find_line(part, selection.pin)
  local status = line and status_of(selection, line) or 'inactive'
  if status == '' then return line end
  selection.keeps_pin = status == 'limited' or status == 'cooling'
  if not selection.keeps_pin then redis.call('DEL', selection.pin_key) end
  return nil
end

-- The answer when there is no candidate: the tactic's choice among those that only a cooldown or a breaker keeps back,
-- or why there is none.
local function without_candidate(selection, rule, part)
  local open, has_active, within, wait, is_never = 0, false, {}, nil, true
  load_all(part)
  for _, line in ipairs(lines_of(part)) do
    local status = status_of(selection, line)
    has_active = has_active or status ~= 'inactive'
    if status ~= 'inactive' and status ~= 'excluded' then
      open = open + 1
      local ms = selection.waits[line.id]
      if status ~= 'limited' then
        within[line.id] = line
      elseif ms ~= LIMIT_NEVER then
        wait, is_never = math.min(wait or ms, ms), false
      end
    end
  end
  if open == 0 then return {'none', selection.is_retry and has_active and 'tried' or 'inactive', 0} end
  if not next(within) then return {'none', 'limited', is_never and LIMIT_NEVER or wait} end
  if selection.is_retry then return {'none', 'tried', 0} end
  if refuses(part) then
    local due, cooled
    for _, line in pairs(within) do
      local service = state_of(line)
      if status_of(selection, line) == 'broken' then
        local left = math.max(0, read_breaker(service.breaker).until_ms - now)
        due = math.min(due or math.huge, left > 0 and left or LIMIT_UNKNOWN_MS)
      else
        cooled = math.min(cooled or math.huge, service.cooldown - now)
      end
    end
    return {'none', due and 'broken' or 'cooling', due or cooled}
  end
  local function may_serve(line) return within[line.id] ~= nil end
  if part.top >= 0 then may_serve = of_tier(may_serve, (least_tier(part, may_serve, -1))) end
  local choice = choose(part, selection, may_serve)
  choice.reason, choice.streak, choice.is_switch = 'exhausted', part.streak, 0
  return take(selection, rule, part, choice)
end

local function pick_only(selection, rule, part)
  if selection.is_retry then return {'none', 'tried', 0} end
  local line = find_line(part, selection.only)
  if not line or status_of(selection, line) ~= '' then return without_candidate(selection, rule, part) end
  return take(selection, rule, part, {line = line, reason = 'pinned', streak = part.streak, is_switch = 0})
end

local function pick(selection, rule, part)
  if selection.is_retry and rule.budget < RETRY_COST then return {'none', 'budget', 0} end
  if selection.only ~= '' then return pick_only(selection, rule, part) end
  if selection.pin_key and not selection.is_retry then
    local line = pinned(part, selection)
    if line then
      local is_switch = part.cursor ~= '' and part.cursor ~= line.id and 1 or 0
      return take(selection, rule, part,
        {line = line, reason = 'pinned', streak = part.streak, is_switch = is_switch, pins = true})
    end
  end
  if pool.broken ~= '' and not selection.is_retry then
    local line = find_probe(part, selection)
    if line then
      return take(selection, rule, part,
        {line = line, reason = 'probe', streak = part.streak, is_switch = 0, is_probe = true})
    end
  end
  local choice = choose_candidate(part, selection)
  if not choice then return without_candidate(selection, rule, part) end
  if selection.is_retry then
    choice.reason, choice.streak, choice.is_switch = 'retry', part.streak, 0
  else
    choice.is_switch = part.cursor ~= '' and part.cursor ~= choice.line.id and 1 or 0
    choice.moves, choice.pins = true, selection.pin_key and not selection.keeps_pin
  end
  return take(selection, rule, part, choice)
end

-- True for a name that is in use, or was given up less than a minute ago; one call may have it twice.
local function is_taken(i, number)
  local until_ms = string.match(known[i] or '', '^x (%d+)$')
  return taken[number] or (until_ms and tonumber(until_ms) > now) or (known[i] and not until_ms)
end

for i, selection in ipairs(selections) do
  if is_taken(i, selection.number) then
    answers[i] = {'abandoned'}
  else
    local rule = load_rule(selection.rule)
    local part = part_of(selection.partition)
    if rule.revision > selection.revision then
      answers[i] = {'stale', rule.revision}
    elseif rule.revision < selection.revision or not tactic_table[part.tactic] then
      answers[i] = {'define', rule.revision}
    else
      answers[i] = pick(selection, rule, part)
    end
  end
end

local set = {}
for name, rule in pairs(rules) do
  if rule.is_changed then
    set[#set + 1] = 'seq:' .. name
    set[#set + 1] = whole(rule.seq)
    if rule.is_budget_changed then
      set[#set + 1] = 'budget:' .. name
      set[#set + 1] = whole(rule.budget)
    end
  end
end
for _, part in pairs(parts) do
  if part.is_changed then save_partition(part, set) end
end
if #set > 0 then redis.call('HSET', partitions_key, unpack(set)) end
if #held > 0 then redis.call('HSET', holdings_key, unpack(held)) end
save_services(services, services_key, written_fields)
save_services(meters, services_key, meter_fields)
redis.call('ZADD', leases_key, whole(now + lease_ms), ARGV[2])
close_pool(pool, partitions_key, {services_key, leases_key, decisions_key}, holdings_key)
answers[#answers + 1] = {'pool', pool.epoch, pool.position, pool.lost}
return answers
