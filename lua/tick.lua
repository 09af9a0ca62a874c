-- Settles one numbered batch of a worker, once, and then decides its selections, in order: all that a worker has to say
-- in a turn of its loop. Either part may be missing. What comes of it equals what calls of one entry or selection do.
-- KEYS[1] services      the pool's services, and its place in its history
-- KEYS[2] partitions    the pool's rules and partitions
-- KEYS[3] holdings      of the worker
-- KEYS[4] leases        of all workers
-- KEYS[5] decisions     the stream of events
-- KEYS[6…] pins         of the sessions, one for each selection with an affinity, in their order
-- ARGV[1] worker        who asks
-- ARGV[2] call          `now_ms epoch position lease_ms batch skip entries`, numbers joined by blanks: now_ms is 0 for
--   the server's clock; epoch and position are the highest that the worker has seen, 0 0 for none; lease_ms is how long
--   its lease is renewed for, a few times a lease; batch is 1, 2, 3… for this worker and pool, 0 without one; skip is 1
--   when earlier batches are no longer held by the worker and must be passed over; entries is how many there are
-- ARGV[3…] parts        two for each entry of the batch, then four or more for each of 0 to 64 selections.
--   An entry: numbers, service ('' for an abandoned name, whose service is not known); the numbers, joined by blanks,
--   are `number outcome age_ms input output cached cache_creation reasoning cooldown_ms first_token_us stream_us`: how
--   long the service asks to be left alone, and how fast it was, 0 for not known.
--   A selection: numbers, rule, partition, only (the one service that may be picked, '' for any), and the ids of the
--   excluded; the numbers, joined by blanks, are `number revision draw reserved deadline_ms affinity_ms excluded`: the
--   deadline from now, how long the session stays pinned (0 without one), how many are excluded
-- Returns {word, last, epoch, position, lost}: the word is 'applied', 'none' without a batch, or 'gap' for one that
--   does not follow the last, and changes nothing (without selections the rest is 0 then); and for each selection, in
--   order: {'pick', service, reason, seq, epoch, position, streak, is_switch}, {'none', cause, retry_ms}: the cause
--   is one of inactive, tried, budget, limited, broken and cooling, retry_ms -1 for never; {'stale', revision}: a
--   later revision stands, {'define', revision}: this one is not known here, {'abandoned'}: the name was given up.
-- include: clock
-- include: pool
-- include: ledger
-- include: limits
-- include: view
-- include: tactic/*

local RETRY_COST, PROMOTION_HOLD_MS, ABANDONED_MS = 1000, 60000, 60000
local CALL = '^(%d+) (%d+) (%d+) ([1-9]%d*) (%d+) ([01]) (%d+)$'
local ENTRY = '^(%d+) ([%l_]+) (%d+) (%d+) (%d+) (%d+) (%d+) (%d+) (%d+) (%d+) (%d+)$'
local SELECTION = '^([1-9]%d*) ([1-9]%d*) (%d+) (%d+) (%d+) (%d+) (%d+)$'
local metered_text, pick_counters = {[0] = ' 0 ', ' 1 ', ' 2 ', ' 3 '}, {'in_flight', 'reserved', 'picks'}
-- Whether an outcome is a failure, and what it says of the service: all others say nothing.
local is_failure = {
  rate_limited = true, unauthorized = true, overloaded = true, failed = true, success = false, rejected = false,
  cancelled = false, abandoned = false,
}
local verdicts = {success = 'success', unauthorized = 'failure', overloaded = 'failure', failed = 'failure'}
-- What the call is of. `texts` is what each name holds: false for nothing, '' for what this batch has taken away.
-- `asked` is the selection that is being decided.
local call = {
  worker = ARGV[1], now = 0, batch = 0, pool = false, state = false, rules = {}, parts = {}, cursors = {}, entries = {},
  selections = {}, names = {'last'}, pins = 0, texts = {}, gone = {}, held = {}, asked = false, view = false,
}

-- The entry out of its arguments, nil when they are malformed.
local function read_entry(text, service)
  local number, outcome, age_ms, input, output, cached, cache_creation, reasoning, cooldown_ms, first_token_us,
    stream_us = string.match(text or '', ENTRY)
  if not number or is_failure[outcome] == nil then return nil end
  age_ms, input, output, cached, cache_creation = age_ms + 0, input + 0, output + 0, cached + 0, cache_creation + 0
  reasoning, cooldown_ms, first_token_us = reasoning + 0, cooldown_ms + 0, first_token_us + 0
  stream_us = stream_us + 0
  local largest = math.max(number, age_ms, input, output, cached, cache_creation, reasoning, cooldown_ms,
    first_token_us, stream_us)
  local has_spelling = string.byte(number) ~= 48 or number == '0'
  if largest > MOST_WHOLE or not has_spelling or not service or (service == '' and outcome ~= 'abandoned') then
    return nil
  end
  return {
    number = number, service = service, outcome = outcome, age_ms = age_ms, input = input, output = output,
    cached = cached, cache_creation = cache_creation, reasoning = reasoning, cooldown_ms = cooldown_ms,
    first_token_us = first_token_us, stream_us = stream_us, holding = false,
  }
end

-- The selection whose arguments begin there, and where the next begins; nil when they are malformed.
local function read_selection(at, last)
  local number, revision, draw, reserved_text, deadline_ms, affinity_ms, excluded = string.match(ARGV[at], SELECTION)
  if not number then return nil end
  local reserved = reserved_text + 0
  revision, draw, deadline_ms, affinity_ms = revision + 0, draw + 0, deadline_ms + 0, affinity_ms + 0
  excluded = excluded + 0
  local largest = math.max(number, revision, reserved, deadline_ms, affinity_ms)
  if largest > MOST_WHOLE or draw >= 4294967296 or at + 3 + excluded > last then return nil end
  local selection = {
    number = number, revision = revision, draw = draw, reserved = reserved, reserved_text = reserved_text,
    deadline_ms = deadline_ms, affinity_ms = affinity_ms, rule = ARGV[at + 1], partition = ARGV[at + 2],
    only = ARGV[at + 3], is_retry = excluded > 0, excluded = false, pin_key = false, pin = false, keeps_pin = false,
  }
  if affinity_ms > 0 then
    call.pins = call.pins + 1
    selection.pin_key = KEYS[5 + call.pins]
  end
  if excluded > 0 then
    selection.excluded = {}
    for i = at + 4, at + 3 + excluded do selection.excluded[ARGV[i]] = true end
  end
  return selection, at + 4 + excluded
end

-- Takes the arguments apart; an error when one is malformed.
local function read_parts(count)
  local last, at = #ARGV, 3
  for i = 1, count do
    local entry = read_entry(ARGV[at], ARGV[at + 1])
    if not entry then return redis.error_reply('BALANCER tick: entry ' .. i .. ' is malformed') end
    call.entries[i], call.names[i + 1], at = entry, entry.number, at + 2
  end
  local taken = 0
  while at <= last do
    local selection, following = read_selection(at, last)
    taken = taken + 1
    if not selection then return redis.error_reply('BALANCER tick: selection ' .. taken .. ' is malformed') end
    call.selections[taken], call.names[count + 1 + taken], at = selection, selection.number, following
  end
  if taken > 64 or (taken == 0 and call.batch == 0) then
    return redis.error_reply('BALANCER tick: a batch or selections, 64 at most')
  end
  if call.batch == 0 and count > 0 then return redis.error_reply('BALANCER tick: entries without a batch') end
  if call.pins ~= #KEYS - 5 then return redis.error_reply('BALANCER tick: one pin for each affinity') end
  return nil
end

-- Reads all rules and partitions that are asked for; the services that their cursors stand on are noted.
local function open_rules()
  local fields, count = {}, 0
  for i = 1, #call.selections do
    local selection = call.selections[i]
    local rule, id = selection.rule, selection.partition
    if not call.rules[rule] then
      count = count + 1
      fields[count], call.rules[rule] = 'rule:' .. rule, count
    end
    if not call.parts[id] then
      fields[count + 1], fields[count + 2], call.parts[id] = 'tactic:' .. id, 'partition:' .. id, count + 1
      count = count + 2
    end
  end
  local values = redis.call('HMGET', KEYS[2], unpack(fields))
  for rule, place in pairs(call.rules) do call.rules[rule] = parse_rule(values[place]) end
  for id, place in pairs(call.parts) do
    local part = parse_partition(KEYS[2], id, values[place], values[place + 1])
    if part.current then call.cursors[#call.cursors + 1] = part.cursor end
    part.choose, call.parts[id] = tactic_named(part.tactic), part
  end
end

-- == the end of attempts

-- What each name holds that is settled, and the services to be read. A name that comes twice holds it once.
local function find_holdings()
  local ids = {}
  for i = 1, #call.entries do
    local entry = call.entries[i]
    local number = entry.number
    local text = call.texts[number]
    local holding = text and (read_holding(text) or read_lost(text))
    local id = entry.service
    if holding then
      entry.holding, id, call.texts[number], call.gone[#call.gone + 1] = holding, holding.id, '', number
    end
    if id ~= '' then ids[#ids + 1] = id end
  end
  return ids
end

-- An attempt that was never sent: what it held is given back, or its name is remembered.
local function abandon(entry, service) -- apart: special
  if service then
    service.abandoned, service.is_changed = service.abandoned + 1, true
  else
    local text, count = string.format('x %d', call.now + ABANDONED_MS), #call.held
    call.held[count + 1], call.held[count + 2], call.texts[entry.number] = entry.number, text, text
  end
end

local function count_usage(entry, service)
  local age_ms, input, output, cooldown_ms = entry.age_ms, entry.input, entry.output, entry.cooldown_ms
  service.requests = service.requests + 1
  if is_failure[entry.outcome] then service.failures = service.failures + 1 end
  service.input, service.output = service.input + input, service.output + output
  service.cached = service.cached + entry.cached
  service.cache_creation = service.cache_creation + entry.cache_creation
  service.reasoning = service.reasoning + entry.reasoning
  if call.now - age_ms > service.last_used then service.last_used = call.now - age_ms end
  service.is_changed = true
  add_window_tokens(service, input, output, call.now, age_ms)
  if cooldown_ms > 0 then service.cooldown = math.max(service.cooldown, call.now - age_ms + cooldown_ms) end
  if age_ms == 0 and entry.outcome == 'success' then
    add_latency(service, entry.first_token_us, entry.stream_us, output, call.now)
  end
end

-- What a minute counts of an attempt: what was reported; of one that was served and reported nothing, as when its
-- client left, what it had reserved. Otherwise such clients would have no limit.
local function minute_tokens(entry, holding) -- apart: limits
  local tokens = entry.input + entry.output
  local is_served = entry.outcome == 'success' or entry.outcome == 'cancelled'
  return tokens == 0 and is_served and holding.reserved or tokens
end

local function record_settle(entry, place, id, before, service) -- apart: special
  record_event(call.pool, 'settle', {
    'worker', call.worker, 'number', entry.number, 'batch', whole(call.batch), 'place', place, 'service', id,
    'outcome', entry.outcome, 'age_ms', whole(entry.age_ms), 'input', whole(entry.input),
    'output', whole(entry.output), 'cached', whole(entry.cached), 'cache_creation', whole(entry.cache_creation),
    'reasoning', whole(entry.reasoning), 'cooldown_ms', whole(entry.cooldown_ms),
    'first_token_us', whole(entry.first_token_us), 'stream_us', whole(entry.stream_us), 'before', before,
    'after', service and event_text(service) or '',
  })
end

-- Applies the entry at a place of the batch.
local function settle(entry, place)
  local holding, id, outcome = entry.holding, entry.service, entry.outcome
  if holding then id = holding.id end
  local service = call.state.services[id]
  local before = advance(call.pool) and (service and event_text(service) or '')
  local is_lost = holding and holding.is_lost
  if is_lost then
    uncount_lost(service, holding)
  elseif holding then
    release(service, holding)
  end
  if outcome == 'abandoned' then
    abandon(entry, service)
  else
    count_usage(entry, service)
    if holding and not is_lost and holding.is_metered and entry.age_ms < 60000 then
      add_minute_tokens(service, holding, minute_tokens(entry, holding), call.now)
    end
  end
  if service and not is_lost then
    local verdict = entry.age_ms == 0 and verdicts[outcome] or ''
    settle_breaker(call.pool, service, id, provider_numbers(service), verdict, holding and holding.probe or 0)
  end
  if before then record_settle(entry, place, id, before, service) end
end

-- == the picks

local function state_of(line)
  local service = call.state.services[line.id]
  if service then return service end
  load_services(call.state, {}, nil, {line.id})
  return call.state.services[line.id]
end

local function counts(line)
  local service = state_of(line)
  local requests, tokens = window_counts(service.windows, line.window, call.now)
  return requests, tokens + service.reserved
end

-- What keeps a service from serving what is asked: inactive, excluded, limited (then line.wait is for how long),
-- broken, cooling; '' for a candidate. Found out once.
local function status_of(line)
  if line.looked_at_by == call.asked then return line.status end
  local id, excluded, only, status, wait = line.id, call.asked.excluded, call.asked.only, '', nil
  if not line.is_active then
    status = 'inactive'
  elseif (excluded and excluded[id]) or (only ~= '' and only ~= id) then
    status = 'excluded'
  else
    local service = state_of(line)
    local meter = service.meter
    if line.has_limits then wait = limit_wait(line, service, call.asked.reserved, call.now) end
    if meter.has_limits then
      wait = longer(wait, limit_wait(provider_limits(meter), meter, call.asked.reserved, call.now))
    end
    if wait then
      status = 'limited'
    elseif is_open(service) and has_breaker(provider_numbers(service)) then
      status = 'broken'
    elseif service.cooldown > call.now then
      status = 'cooling'
    end
  end
  line.looked_at_by, line.status, line.wait = call.asked, status, wait
  return status
end

local function is_candidate(line)
  return status_of(line) == ''
end

local chosen = {
  line = false, streak = 0, reason = '', memory = '', is_switch = 0, moves = false, pins = false, tier = false,
  hold = false, by_tactic = true,
}

-- Chooses by the partition's tactic among those that may serve: `chosen`, or nil when there is none. The first of them
-- counts as the cursor where there is none.
local function choose(part, may_serve)
  local cursor, current, was_streak = part.cursor, part.current, part.streak
  call.view.part, call.view.may_serve, call.view.found = part, may_serve, false
  if cursor == '' then
    local first = call.view.after('')
    if not first then return nil end
    part.cursor, part.current, part.streak = first.id, first, 0
  end
  local id, streak, reason, memory = part.choose(part, call.view, call.asked.draw)
  local found = call.view.found
  local line = id and (found and found.id == id and found or find_line(part, id))
  if cursor == '' then part.cursor, part.current, part.streak = cursor, current, was_streak end
  if not line then return nil end
  chosen.line, chosen.streak, chosen.reason, chosen.memory = line, streak, reason, memory or part.memory
  chosen.moves, chosen.pins, chosen.tier, chosen.hold = false, false, false, false
  return chosen
end

-- Counts a request on a service and its provider; which of their minutes counts it: 0 none, 1 the service's, 2 the
-- provider's, 3 both.
local function count_pick(reserved, line, service)
  local metered, meter = 0, service.meter
  if not service.is_rolled then roll_windows(service, call.now) end
  local windows = service.windows
  for i = 1, #windows do
    local w = windows[i]
    w.requests = w.requests + 1
  end
  service.in_flight, service.reserved = service.in_flight + 1, service.reserved + reserved
  service.picks, service.is_changed = service.picks + 1, true
  if line.rpm ~= 0 or line.tpm ~= 0 then
    count_minute(service, call.now, 1, 0)
    metered = 1
  end
  if meter.has_limits then
    count_minute(meter, call.now, 1, 0)
    meter.in_flight, meter.reserved, meter.is_changed = meter.in_flight + 1, meter.reserved + reserved, true
    metered = metered + 2
  end
  return metered
end

-- The tactic's choice among the candidates of the tier that serves now, with .tier and .hold. A lower one serves only
-- while no higher has a candidate, and for a minute at least.
local function choose_in_tier(part) -- apart: special
  local tier, hold = serving_tier(part), part.hold
  local is_at_top = tier == part.top and part.current and part.current.tier == tier and is_candidate(part.current)
  if not is_at_top then
    load_all(call.state, part, lines_of(part))
    local least, has_tier = least_tier(part, is_candidate, tier)
    if not least then return nil end
    if least > tier then
      tier, hold = least, call.now + PROMOTION_HOLD_MS
    elseif least < tier and (call.now >= hold or not has_tier) then
      tier = least
    end
  end
  local choice = choose(part, of_tier(is_candidate, tier))
  if choice then choice.tier, choice.hold = tier, hold end
  return choice
end

-- The first service in the rule's order whose half-open breaker nobody tries, nil without one.
local function find_probe(part) -- apart: special
  local is_due_id = {}
  for until_ms, id in string.gmatch(call.pool.broken, '(%d+) ([^\n]+)\n') do
    if until_ms + 0 <= call.now then is_due_id[id] = true end
  end
  if not next(is_due_id) then return nil end
  local tier = serving_tier(part)
  for _, line in ipairs(lines_of(part)) do
    if is_due_id[line.id] and (not tier or line.tier <= tier) and status_of(line) == 'broken' then
      local service = state_of(line)
      if is_due(breaker_of(service), call.now) and service.cooldown <= call.now then return line end
    end
  end
  return nil
end

-- What a sampled pick saw, so that it can be checked by itself.
local function seen_by_tactic(part) -- apart: special
  local lines = {}
  for i, line in ipairs(lines_of(part)) do
    local requests, tokens = counts(line)
    local service = state_of(line)
    lines[i] = string.format('%d %d %d %d %d %d', call.view.may_serve(line) and 1 or 0, requests, tokens,
      service.in_flight, service.first_token, service.per_token)
  end
  return {
    'params', part.params_text, 'memory', part.memory, 'services', services_text(part),
    'counts', table.concat(lines, '\n'),
  }
end

local function record_pick(selection, part, fields, sample) -- apart: special
  local excluded = {}
  for other in pairs(selection.excluded or {}) do excluded[#excluded + 1] = other end
  local event = {
    'worker', call.worker, 'number', selection.number, 'rule', selection.rule, 'partition', selection.partition,
    'revision', whole(selection.revision), 'tactic', part.tactic, 'draw', whole(selection.draw),
    'reserved', whole(selection.reserved), 'deadline_ms', whole(call.now + selection.deadline_ms),
    'excluded', table.concat(excluded, '\n'), 'affinity_ms', whole(selection.affinity_ms), 'only', selection.only,
    'pin', selection.pin or '',
  }
  for _, list in ipairs({fields, sample}) do
    for _, value in ipairs(list) do event[#event + 1] = value end
  end
  record_event(call.pool, 'pick', event)
end

-- The service's breaker has a probe out: the pick at this position.
local function send_probe(service, id) -- apart: special
  breaker_of(service).probe = call.pool.position
  list_breaker(call.pool, service, id)
  return whole(call.pool.position)
end

-- The service that the session is pinned to, when it may be picked. A limit or a cooldown passes, and the pin stands
-- meanwhile (selection.keeps_pin); all else ends it.
local function pinned(part, selection)
  selection.pin = redis.call('GET', selection.pin_key) or ''
  if selection.pin == '' then return nil end
  local line = find_line(part, selection.pin)
  local status = line and status_of(line) or 'inactive'
  if status == '' then return line end
  selection.keeps_pin = status == 'limited' or status == 'cooling'
  if not selection.keeps_pin then redis.call('DEL', selection.pin_key) end
  return nil
end

-- Why none of those that only a cooldown or a breaker keeps back serves, and for how long.
local function refuse(within) -- apart: special
  local due, cooled
  for _, line in pairs(within) do
    local service = state_of(line)
    if status_of(line) == 'broken' then
      local left = math.max(0, breaker_of(service).until_ms - call.now)
      due = math.min(due or math.huge, left > 0 and left or LIMIT_UNKNOWN_MS)
    else
      cooled = math.min(cooled or math.huge, service.cooldown - call.now)
    end
  end
  return {'none', due and 'broken' or 'cooling', due or cooled}
end

-- The answer when there is no candidate: the tactic's choice among those that only a cooldown or a breaker keeps
-- back, or why there is none.
local function without_candidate(selection, rule, part) -- apart: special
  local open, has_active, within, wait, is_never = 0, false, {}, nil, true
  load_all(call.state, part, lines_of(part))
  for _, line in ipairs(lines_of(part)) do
    local status = status_of(line)
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
  if part.refuses then return refuse(within) end
  local function may_serve(line) return within[line.id] ~= nil end
  if part.top >= 0 then may_serve = of_tier(may_serve, (least_tier(part, may_serve, -1))) end
  local choice = choose(part, may_serve)
  choice.reason, choice.streak, choice.is_switch = 'exhausted', part.streak, 0
  return take(selection, rule, part, choice)
end

local function pick_only(selection, rule, part) -- apart: special
  if selection.is_retry then return {'none', 'tried', 0} end
  local line = find_line(part, selection.only)
  if not line or status_of(line) ~= '' then return without_candidate(selection, rule, part) end
  return take(selection, rule, part, {line = line, reason = 'pinned', streak = part.streak, is_switch = 0})
end

-- Picks what was chosen: .line, .reason, .streak, .is_switch, .is_probe; .moves with .memory, .tier and .hold.
local function take(selection, rule, part, choice)
  local line, number = choice.line, selection.number
  local id, service = line.id, state_of(line)
  local is_recorded, before, sample = advance(call.pool), '', nil
  local cursor, streak_before = part.cursor, part.streak
  if is_recorded then
    before = counters_text(service, pick_counters)
    sample = call.pool.record == 'sampled' and choice.by_tactic and seen_by_tactic(part) or {}
  end
  local metered = count_pick(selection.reserved, line, service)
  local probe = choice.is_probe and send_probe(service, id) or '0'
  if choice.moves then
    if part.current ~= line then move_cursor(part, line) end
    part.streak, part.memory, part.is_changed = choice.streak, choice.memory, true
    part.tier, part.hold = choice.tier or part.tier, choice.hold or part.hold
  end
  local budget = rule.budget + (selection.is_retry and -RETRY_COST or rule.retry_permille)
  if budget > MOST_BUDGET then budget = MOST_BUDGET end
  if budget ~= rule.budget then rule.budget, rule.is_unused = budget, false end
  local seq, at = rule.seq + 1, #call.held
  rule.seq, rule.is_changed = seq, true
  local text = 'h ' .. selection.reserved_text .. string.format(' %d', call.now + selection.deadline_ms) .. metered_text[metered]
    .. probe .. ' ' .. id
  call.held[at + 1], call.held[at + 2], call.texts[number] = number, text, text
  if choice.pins then redis.call('SET', selection.pin_key, id, 'PX', whole(selection.affinity_ms)) end
  if is_recorded then
    record_pick(selection, part, {
      'service', id, 'reason', choice.reason, 'seq', whole(seq), 'cursor', cursor,
      'streak_before', streak_before, 'streak', choice.streak, 'is_switch', choice.is_switch, 'meters', metered,
      'before', before, 'after', counters_text(service, pick_counters),
    }, sample)
  end
  return {'pick', id, choice.reason, seq, call.pool.epoch, call.pool.position, choice.streak, choice.is_switch}
end

local function pick(selection, rule, part)
  local is_retry, pin_key = selection.is_retry, selection.pin_key
  if is_retry and rule.budget < RETRY_COST then return {'none', 'budget', 0} end
  if selection.only ~= '' then return pick_only(selection, rule, part) end
  if pin_key and not is_retry then
    local line = pinned(part, selection)
    if line then
      local is_switch = part.cursor ~= '' and part.cursor ~= line.id and 1 or 0
      return take(selection, rule, part,
        {line = line, reason = 'pinned', streak = part.streak, is_switch = is_switch, pins = true})
    end
  end
  if call.pool.broken ~= '' and not is_retry then
    local line = find_probe(part)
    if line then
      return take(selection, rule, part,
        {line = line, reason = 'probe', streak = part.streak, is_switch = 0, is_probe = true})
    end
  end
  local choice
  if part.top < 0 then choice = choose(part, is_candidate) else choice = choose_in_tier(part) end
  if not choice then return without_candidate(selection, rule, part) end
  if is_retry then
    choice.reason, choice.streak, choice.is_switch = 'retry', part.streak, 0
  else
    choice.is_switch = part.cursor ~= '' and part.cursor ~= choice.line.id and 1 or 0
    choice.moves, choice.pins = true, pin_key and not selection.keeps_pin
  end
  return take(selection, rule, part, choice)
end

-- True for a name that is in use, or was given up less than a minute ago; one call may have it twice.
local function is_taken(text)
  if not text or text == '' then return false end
  local until_ms = string.match(text, '^x (%d+)$')
  return not until_ms or until_ms + 0 > call.now
end

local function decide(selection)
  local rule, part, revision = call.rules[selection.rule], call.parts[selection.partition], selection.revision
  if is_taken(call.texts[selection.number]) then return {'abandoned'} end
  if rule.revision > revision then return {'stale', rule.revision} end
  if rule.revision < revision or not part.choose then return {'define', rule.revision} end
  call.asked = selection
  return pick(selection, rule, part)
end

-- The fields and values of the rules and partitions that have changed.
local function changed_rules()
  local set, at = {}, 0
  for name, rule in pairs(call.rules) do
    if rule.is_changed then
      set[at + 1], set[at + 2] = 'rule:' .. name, rule_text(rule)
      at = at + 2
    end
  end
  for id, part in pairs(call.parts) do
    if part.is_changed then
      set[at + 1], set[at + 2] = 'partition:' .. id, partition_text(part)
      at = at + 2
    end
  end
  return set
end

-- main

local now_arg, epoch, position, lease_arg, batch_arg, skip, entry_count = string.match(ARGV[2] or '', CALL)
if not now_arg or math.max(now_arg, epoch, position, lease_arg, batch_arg, entry_count) > MOST_WHOLE then
  return redis.error_reply('BALANCER tick: malformed argument')
end
local batch, lease_ms = batch_arg + 0, lease_arg + 0
call.batch, call.state = batch, open_services(KEYS[1], true)
local malformed = read_parts(entry_count + 0)
if malformed then return malformed end

local entries, selections, names, texts = call.entries, call.selections, call.names, call.texts
local known = redis.call('HMGET', KEYS[3], unpack(names))
for i = 2, #names do texts[names[i]] = known[i] end
local last, renewed = string.match(known[1] or '0 0', '^(%d+) +(%d+)$')
last, renewed = last + 0, renewed + 0
local is_gap = batch > last + 1 and skip == '0'
if is_gap and not selections[1] then return {{'gap', last, 0, 0, 0}} end

local now, is_applied, ids, answers = clock(now_arg + 0), batch > last and not is_gap, {}, {false}
call.now = now
if is_applied then ids = find_holdings() end
if selections[1] then
  open_rules()
  call.view = new_view({
    part = false, may_serve = false, found = false, state_of = state_of, counts = counts, state = call.state,
  })
end
local fields = load_services(call.state, ids, {'place', 'record', 'broken'}, call.cursors)
local pool = open_pool(fields, KEYS[5], epoch + 0, position + 0, now)
call.pool = pool
if is_applied then
  for place = 1, #entries do settle(entries[place], place) end
  last = batch
end
for i = 1, #selections do answers[i + 1] = decide(selections[i]) end

-- First of all what takes memory, so that a server that has none refuses all of it. The lease is written when a third
-- of it has passed, and then the holdings are kept from expiring; a short one is written at once.
local renews, is_new = now - renewed >= lease_ms / 3 or renewed > now or lease_ms < 1000, false
if renews then is_new = redis.call('ZADD', KEYS[4], string.format('%d', now + lease_ms), call.worker) > 0 end
local set, held = changed_rules(), call.held
if set[1] then is_new = redis.call('HSET', KEYS[2], unpack(set)) > 0 or is_new end
close_pool(pool, KEYS[1], changed_fields(call.state), KEYS[2], KEYS[4], is_new)
if call.gone[1] then redis.call('HDEL', KEYS[3], unpack(call.gone)) end
if is_applied or (renews and known[1]) then
  held[#held + 1] = 'last'
  held[#held + 1] = string.format(LONG_LAST, last, renews and now or renewed)
end
if held[1] then redis.call('HSET', KEYS[3], unpack(held)) end
if renews then redis.call('PEXPIRE', KEYS[3], HOLDINGS_LIVE_MS) end
local word = batch == 0 and 'none' or is_gap and 'gap' or 'applied'
answers[1] = {word, last, pool.epoch, pool.position, pool.lost}
return answers
