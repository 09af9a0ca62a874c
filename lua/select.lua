-- Picks a service for each of 1 to 64 selections of one pool, in order, as if each were a call of its own.
-- KEYS[1] services      the pool's services, and its place in its history
-- KEYS[2] partitions    the pool's rules and partitions
-- KEYS[3] holdings      of the asking worker
-- KEYS[4] leases        of all workers
-- KEYS[5] decisions     the stream of events
-- KEYS[6…] pins         of the sessions, one for each selection with an affinity, in their order
-- ARGV[1] now_ms        0 for the server's clock
-- ARGV[2] worker        who asks
-- ARGV[3] epoch         the highest epoch and
-- ARGV[4] position      position in it that the worker has seen, 0 0 for none
-- ARGV[5] lease_ms      how long the worker's lease is renewed for
-- ARGV[6…] selections   numbers, rule, partition, only (the one service that may be picked, '' for any), and the ids of
--   the excluded; the numbers, joined by blanks, are `number revision draw reserved deadline_ms affinity_ms excluded`:
--   the deadline from now, how long the session stays pinned (0 without one), how many are excluded
-- Returns an array for each selection, in order:
--   {'pick', service, reason, seq, epoch, position, streak, is_switch}, {'none', cause, retry_ms}: the cause is one of
--   inactive, tried, budget, limited, broken and cooling, retry_ms -1 for never; {'stale', revision}: a later revision
--   stands, {'define', revision}: this one is not known here, {'abandoned'}: the name was given up;
--   then {'pool', epoch, position, lost}.
-- include: clock
-- include: pool
-- include: service
-- include: breaker
-- include: limits
-- include: partition
-- include: tactic/*

local services_key, partitions_key, holdings_key = KEYS[1], KEYS[2], KEYS[3]
local leases_key, decisions_key = KEYS[4], KEYS[5]
local counters = {'in_flight', 'reserved', 'picks'}
local NUMBERS = '^([1-9]%d*) ([1-9]%d*) (%d+) (%d+) (%d+) (%d+) (%d+)$'
local METERED = {[0] = ' 0 ', ' 1 ', ' 2 ', ' 3 '}
local RETRY_COST, PROMOTION_HOLD_MS = 1000, 60000

-- The selection whose arguments begin there, nil when they are malformed.
local function read_selection(at)
  local number, revision, draw, reserved_text, deadline_ms, affinity_ms, excluded = string.match(ARGV[at], NUMBERS)
  if not number then return nil end
  local reserved = reserved_text + 0
  revision, draw, deadline_ms, affinity_ms = revision + 0, draw + 0, deadline_ms + 0, affinity_ms + 0
  excluded = excluded + 0
  if number + 0 > MOST_WHOLE or revision > MOST_WHOLE or draw >= 4294967296 or reserved > MOST_WHOLE
      or deadline_ms > MOST_WHOLE or affinity_ms > MOST_WHOLE or at + 3 + excluded > #ARGV then return nil end
  local selection = {
    number = number, revision = revision, draw = draw, reserved = reserved, reserved_text = reserved_text,
    deadline_ms = deadline_ms,
    affinity_ms = affinity_ms, rule = ARGV[at + 1], partition = ARGV[at + 2], only = ARGV[at + 3],
    is_retry = excluded > 0, excluded = false, size = 4 + excluded, pin_key = false, pin = false, keeps_pin = false,
  }
  if excluded > 0 then
    selection.excluded = {}
    for i = at + 4, at + 3 + excluded do selection.excluded[ARGV[i]] = true end
  end
  return selection
end

local selections, names, pins, at = {}, {'last'}, 0, 6
while at <= #ARGV do
  local selection = read_selection(at)
  local count = #selections + 1
  if not selection then return redis.error_reply('BALANCER select: selection ' .. count .. ' is malformed') end
  if selection.affinity_ms > 0 then
    pins = pins + 1
    selection.pin_key = KEYS[5 + pins]
  end
  selections[count], names[count + 1] = selection, selection.number
  at = at + selection.size
end
local now_arg, seen_epoch, seen_position = to_whole(ARGV[1], 0), to_whole(ARGV[3], 0), to_whole(ARGV[4], 0)
local lease_ms = to_whole(ARGV[5], 1)
if #selections < 1 or #selections > 64 then return redis.error_reply('BALANCER select: 1 to 64 selections') end
if not (now_arg and seen_epoch and seen_position and lease_ms) then
  return redis.error_reply('BALANCER select: malformed argument')
end
if pins ~= #KEYS - 5 then return redis.error_reply('BALANCER select: one pin for each affinity') end

local now = clock(now_arg)
local known = redis.call('HMGET', holdings_key, unpack(names))
local state, rules, parts, held, taken, answers = open_services(services_key), {}, {}, {}, {}, {}

-- Reads all rules and partitions that are asked for, the services that their cursors stand on, and the pool's place.
local function open_call()
  local fields, rule_names, ids, cursors = {}, {}, {}, {}
  for _, selection in ipairs(selections) do
    local rule, id = selection.rule, selection.partition
    if not rules[rule] then rules[rule], rule_names[#rule_names + 1] = true, rule end
    if not parts[id] then parts[id], ids[#ids + 1] = true, id end
  end
  for i, name in ipairs(rule_names) do fields[i] = 'rule:' .. name end
  for _, id in ipairs(ids) do
    local count = #fields
    fields[count + 1], fields[count + 2] = 'tactic:' .. id, 'partition:' .. id
  end
  local values = redis.call('HMGET', partitions_key, unpack(fields))
  for i, name in ipairs(rule_names) do rules[name] = parse_rule(values[i]) end
  for i, id in ipairs(ids) do
    local place = #rule_names + 2 * i
    local part = parse_partition(partitions_key, id, values[place - 1], values[place])
    if part.current then cursors[#cursors + 1] = part.cursor end
    parts[id] = part
  end
  return open_pool(load_services(state, cursors, place_fields()), decisions_key, seen_epoch, seen_position, now)
end

local pool = open_call()

local function state_of(line)
  return state.services[line.id] or load_service(state, line.id)
end

-- Loads all services of a partition at once, for who looks at each.
local function load_all(part)
  if part.is_loaded then return end
  local ids = {}
  for i, line in ipairs(lines_of(part)) do ids[i] = line.id end
  load_services(state, ids)
  part.is_loaded = true
end

local function counts(line)
  local service = state_of(line)
  local requests, tokens = window_counts(service.windows, line.window, now)
  return requests, tokens + service.reserved
end

-- What keeps a service from serving: inactive, excluded, limited (with the wait), broken, cooling; '' for a candidate.
local function find_status(selection, line)
  if not line.is_active then return 'inactive' end
  local id, excluded, only = line.id, selection.excluded, selection.only
  if (excluded and excluded[id]) or (only ~= '' and only ~= id) then return 'excluded' end
  local service = state_of(line)
  local meter, wait = service.meter, nil
  if line.rpm ~= 0 or line.tpm ~= 0 or line.in_flight ~= 0 then
    wait = limit_wait(line, service, selection.reserved, now)
  end
  if meter.has_limits then
    wait = longer(wait, limit_wait(provider_limits(meter), meter, selection.reserved, now))
  end
  if wait then return 'limited', wait end
  if is_open(service) and has_breaker(provider_numbers(service)) then return 'broken' end
  if service.cooldown > now then return 'cooling' end
  return ''
end

-- The same, looked up once for each selection; then line.wait is how long a limit keeps it.
local function status_of(selection, line)
  if line.looked_at_by ~= selection then
    line.looked_at_by = selection
    line.status, line.wait = find_status(selection, line)
  end
  return line.status
end

local asked
local function is_candidate(line)
  return status_of(asked, line) == ''
end

local view = new_view(state_of, counts, load_all, services_text, lines_of)

local chosen = {
  line = false, streak = 0, reason = '', memory = '', is_switch = 0, moves = false, pins = false, tier = false,
  hold = false, by_tactic = true,
}

-- Chooses by the partition's tactic among those that may serve: `chosen`, or nil when there is none. The first of them
-- counts as the cursor where there is none.
local function choose(part, may_serve)
  local cursor, current, was_streak = part.cursor, part.current, part.streak
  view.part, view.may_serve, view.found = part, may_serve, false
  if cursor == '' then
    local first = view.after('')
    if not first then return nil end
    part.cursor, part.current, part.streak = first.id, first, 0
  end
  local id, streak, reason, memory = tactic_named(part.tactic)(part, view, asked.draw)
  local found = view.found
  local line = id and (found and found.id == id and found or find_line(part, id))
  part.cursor, part.current, part.streak = cursor, current, was_streak
  if not line then return nil end
  chosen.line, chosen.streak, chosen.reason, chosen.memory = line, streak, reason, memory or part.memory
  chosen.moves, chosen.pins, chosen.tier, chosen.hold = false, false, false, false
  return chosen
end

local deadlines = {}
local function deadline_text(deadline_ms)
  local text = deadlines[deadline_ms]
  if not text then
    text = whole(now + deadline_ms)
    deadlines[deadline_ms] = text
  end
  return text
end

-- Counts a request on a service and its provider; which of their minutes counts it: 0 none, 1 the service's, 2 the
-- provider's, 3 both.
local function count_pick(reserved, line, service)
  local metered, meter = 0, service.meter
  if not service.is_rolled then roll_windows(service, now) end
  local windows = service.windows
  for i = 1, #windows do
    local w = windows[i]
    w.requests = w.requests + 1
  end
  service.in_flight, service.reserved = service.in_flight + 1, service.reserved + reserved
  service.picks, service.is_changed = service.picks + 1, true
  if line.rpm ~= 0 or line.tpm ~= 0 then
    count_minute(service, now, 1, 0)
    metered = 1
  end
  if meter.has_limits then
    count_minute(meter, now, 1, 0)
    meter.in_flight, meter.reserved, meter.is_changed = meter.in_flight + 1, meter.reserved + reserved, true
    metered = metered + 2
  end
  return metered
end

local take

-- What happens now and then. The server makes all functions of a script in each call: these once one of them is needed.
local function make_rare()
  local rare = {}

  -- The tactic's choice among the candidates of the tier that serves now, with .tier and .hold. A lower one serves only
  -- while no higher has a candidate, and for a minute at least.
  function rare.choose_in_tier(part)
    local tier, hold = serving_tier(part), part.hold
    local is_at_top = tier == part.top and part.current and part.current.tier == tier and is_candidate(part.current)
    if not is_at_top then
      load_all(part)
      local least, has_tier = least_tier(part, is_candidate, tier)
      if not least then return nil end
      if least > tier then
        tier, hold = least, now + PROMOTION_HOLD_MS
      elseif least < tier and (now >= hold or not has_tier) then
        tier = least
      end
    end
    local choice = choose(part, of_tier(is_candidate, tier))
    if choice then choice.tier, choice.hold = tier, hold end
    return choice
  end

  -- The first service in the rule's order whose half-open breaker nobody tries, nil without one.
  function rare.find_probe(part, selection)
    local is_due_id = {}
    for until_ms, id in string.gmatch(pool.broken, '(%d+) ([^\n]+)\n') do
      if until_ms + 0 <= now then is_due_id[id] = true end
    end
    if not next(is_due_id) then return nil end
    local tier = serving_tier(part)
    for _, line in ipairs(lines_of(part)) do
      if is_due_id[line.id] and (not tier or line.tier <= tier) and status_of(selection, line) == 'broken' then
        local service = state_of(line)
        if is_due(breaker_of(service), now) and service.cooldown <= now then return line end
      end
    end
    return nil
  end

  -- What a sampled pick saw, so that it can be checked by itself.
  function rare.seen_by_tactic(part)
    local lines = {}
    for i, line in ipairs(lines_of(part)) do
      local requests, tokens = counts(line)
      local service = state_of(line)
      lines[i] = string.format('%d %d %d %d %d %d', view.may_serve(line) and 1 or 0, requests, tokens,
        service.in_flight, service.first_token, service.per_token)
    end
    return {
      'params', part.params_text, 'memory', part.memory, 'services', services_text(part),
      'counts', table.concat(lines, '\n'),
    }
  end

  function rare.record_pick(selection, part, fields, sample)
    local excluded = {}
    for other in pairs(selection.excluded or {}) do excluded[#excluded + 1] = other end
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

  -- The service's breaker has a probe out: the pick at this position.
  function rare.send_probe(service, id)
    breaker_of(service).probe = pool.position
    list_breaker(pool, service, id, true)
    return whole(pool.position)
  end

  -- The service that the session is pinned to, when it may be picked. A limit or a cooldown passes, and the pin stands
  -- meanwhile (selection.keeps_pin); all else ends it.
  function rare.pinned(part, selection)
    selection.pin = redis.call('GET', selection.pin_key) or ''
    if selection.pin == '' then return nil end
    local line = find_line(part, selection.pin)
    local status = line and status_of(selection, line) or 'inactive'
    if status == '' then return line end
    selection.keeps_pin = status == 'limited' or status == 'cooling'
    if not selection.keeps_pin then redis.call('DEL', selection.pin_key) end
    return nil
  end

  -- The answer when there is no candidate: the tactic's choice among those that only a cooldown or a breaker keeps
  -- back, or why there is none.
  function rare.without_candidate(selection, rule, part)
    local open, has_active, within, wait, is_never = 0, false, {}, nil, true
    load_all(part)
    for _, line in ipairs(lines_of(part)) do
      local status = status_of(selection, line)
      has_active = has_active or status ~= 'inactive'
      if status ~= 'inactive' and status ~= 'excluded' then
        open = open + 1
        if status ~= 'limited' then
          within[line.id] = line
        elseif line.wait ~= LIMIT_NEVER then
          wait, is_never = math.min(wait or line.wait, line.wait), false
        end
      end
    end
    if open == 0 then return {'none', selection.is_retry and has_active and 'tried' or 'inactive', 0} end
    if not next(within) then return {'none', 'limited', is_never and LIMIT_NEVER or wait} end
    if selection.is_retry then return {'none', 'tried', 0} end
    if part.refuses then
      local due, cooled
      for _, line in pairs(within) do
        local service = state_of(line)
        if status_of(selection, line) == 'broken' then
          local left = math.max(0, breaker_of(service).until_ms - now)
          due = math.min(due or math.huge, left > 0 and left or LIMIT_UNKNOWN_MS)
        else
          cooled = math.min(cooled or math.huge, service.cooldown - now)
        end
      end
      return {'none', due and 'broken' or 'cooling', due or cooled}
    end
    local function may_serve(line) return within[line.id] ~= nil end
    if part.top >= 0 then may_serve = of_tier(may_serve, (least_tier(part, may_serve, -1))) end
    local choice = choose(part, may_serve)
    choice.reason, choice.streak, choice.is_switch = 'exhausted', part.streak, 0
    return take(selection, rule, part, choice)
  end

  function rare.pick_only(selection, rule, part)
    if selection.is_retry then return {'none', 'tried', 0} end
    local line = find_line(part, selection.only)
    if not line or status_of(selection, line) ~= '' then return rare.without_candidate(selection, rule, part) end
    return take(selection, rule, part, {line = line, reason = 'pinned', streak = part.streak, is_switch = 0})
  end

  return rare
end

local made
local function rare()
  made = made or make_rare()
  return made
end

-- Picks what was chosen: .line, .reason, .streak, .is_switch, .is_probe; .moves with .memory, .tier and .hold.
function take(selection, rule, part, choice)
  local line = choice.line
  local id, service = line.id, state_of(line)
  local is_recorded, sample, before, cursor, streak_before = advance(pool), {}, nil, part.cursor, part.streak
  if is_recorded then
    before = counters_text(service, counters)
    if pool.record == 'sampled' and choice.by_tactic then sample = rare().seen_by_tactic(part) end
  end
  local metered = count_pick(selection.reserved, line, service)
  local probe = choice.is_probe and rare().send_probe(service, id) or '0'
  if choice.moves then
    move_cursor(part, line)
    part.streak, part.memory, part.is_changed = choice.streak, choice.memory, true
    part.tier, part.hold = choice.tier or part.tier, choice.hold or part.hold
  end
  local budget = rule.budget + (selection.is_retry and -RETRY_COST or rule.retry_permille)
  if budget > MOST_BUDGET then budget = MOST_BUDGET end
  if budget ~= rule.budget then rule.budget, rule.is_unused = budget, false end
  rule.seq, rule.is_changed = rule.seq + 1, true
  taken[selection.number] = true
  local count = #held
  held[count + 1] = selection.number
  held[count + 2] = 'h ' .. selection.reserved_text .. ' ' .. deadline_text(selection.deadline_ms) .. METERED[metered]
    .. probe .. ' ' .. id
  if choice.pins then redis.call('SET', selection.pin_key, id, 'PX', whole(selection.affinity_ms)) end
  if is_recorded then
    rare().record_pick(selection, part, {
      'service', id, 'reason', choice.reason, 'seq', whole(rule.seq), 'cursor', cursor,
      'streak_before', streak_before, 'streak', choice.streak, 'is_switch', choice.is_switch, 'meters', metered,
      'before', before, 'after', counters_text(service, counters),
    }, sample)
  end
  return {'pick', id, choice.reason, rule.seq, pool.epoch, pool.position, choice.streak, choice.is_switch}
end

local function pick(selection, rule, part)
  if selection.is_retry and rule.budget < RETRY_COST then return {'none', 'budget', 0} end
  if selection.only ~= '' then return rare().pick_only(selection, rule, part) end
  if selection.pin_key and not selection.is_retry then
    local line = rare().pinned(part, selection)
    if line then
      local is_switch = part.cursor ~= '' and part.cursor ~= line.id and 1 or 0
      return take(selection, rule, part,
        {line = line, reason = 'pinned', streak = part.streak, is_switch = is_switch, pins = true})
    end
  end
  if pool.broken ~= '' and not selection.is_retry then
    local line = rare().find_probe(part, selection)
    if line then
      return take(selection, rule, part,
        {line = line, reason = 'probe', streak = part.streak, is_switch = 0, is_probe = true})
    end
  end
  local choice
  if part.top < 0 then choice = choose(part, is_candidate) else choice = rare().choose_in_tier(part) end
  if not choice then return rare().without_candidate(selection, rule, part) end
  if selection.is_retry then
    choice.reason, choice.streak, choice.is_switch = 'retry', part.streak, 0
  else
    choice.is_switch = part.cursor ~= '' and part.cursor ~= choice.line.id and 1 or 0
    choice.moves, choice.pins = true, selection.pin_key and not selection.keeps_pin
  end
  return take(selection, rule, part, choice)
end

-- True for a name that is in use, or was given up less than a minute ago; one call may have it twice.
local function is_taken(text, number)
  if taken[number] then return true end
  if not text then return false end
  local until_ms = string.match(text, '^x (%d+)$')
  return not until_ms or until_ms + 0 > now
end

for i, selection in ipairs(selections) do
  if is_taken(known[i + 1], selection.number) then
    answers[i] = {'abandoned'}
  else
    local rule, part = rules[selection.rule], parts[selection.partition]
    if rule.revision > selection.revision then
      answers[i] = {'stale', rule.revision}
    elseif rule.revision < selection.revision or not tactic_named(part.tactic) then
      answers[i] = {'define', rule.revision}
    else
      asked = selection
      answers[i] = pick(selection, rule, part)
    end
  end
end

local set = {}
for name, rule in pairs(rules) do
  if rule.is_changed then
    set[#set + 1] = 'rule:' .. name
    set[#set + 1] = rule_text(rule)
  end
end
for id, part in pairs(parts) do
  if part.is_changed then
    set[#set + 1] = 'partition:' .. id
    set[#set + 1] = partition_text(part)
  end
end
local added = #set > 0 and redis.call('HSET', partitions_key, unpack(set)) or 0
if #held > 0 then redis.call('HSET', holdings_key, unpack(held)) end
local renewed = string.match(known[1] or '0', '%d+$') + 0
if is_stale(renewed, now) then redis.call('PEXPIRE', holdings_key, HOLDINGS_LIVE_MS) end
local is_new = redis.call('ZADD', leases_key, string.format('%d', now + lease_ms), ARGV[2]) + added > 0
close_pool(pool, services_key, changed_fields(state), {partitions_key, leases_key}, is_new)
answers[#answers + 1] = {'pool', pool.epoch, pool.position, pool.lost}
return answers
