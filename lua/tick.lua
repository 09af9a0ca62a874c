-- Settles one numbered batch of a worker, once, and then decides its selections, in order: all that a worker has to say
-- in a turn of its loop. Either part may be missing. What comes of it equals what calls of one entry or selection do.
-- KEYS[1] services      the pool's services, and its place in its history
-- KEYS[2] partitions    the pool's rules and partitions
-- KEYS[3] holdings      of the worker
-- KEYS[4] leases        of all workers
-- KEYS[5] decisions     the stream of events
-- KEYS[6…] pins         of the sessions, one for each selection with an affinity, in their order
-- ARGV[1] worker        who asks
-- ARGV[2] call          packed: now_ms (0 for the server's clock), epoch and position (the highest that the worker has
--   seen, 0 for none), lease_ms (how long its lease is renewed for, a few times a lease), batch (1, 2, 3… for this
--   worker and pool, 0 without one), skips (true when earlier batches are no longer held by the worker and must be
--   passed over), entries of the batch, selections (64 at most).
--   An entry: number, service ('' for an abandoned name, whose service is not known), outcome, age_ms, usage (input,
--   output, cached, cache_creation, reasoning), cooldown_ms (how long the service asks to be left alone),
--   first_token_us and stream_us (how fast it was, 0 for not known).
--   A selection: number, revision, draw, reserved, deadline_ms (from now), affinity_ms (how long the session stays
--   pinned, 0 without one), rule, partition, only (the one service that may be picked, '' for any), excluded (ids of
--   those that were tried before), session, barred (ids of those that cannot serve what is asked; may be missing)
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
-- What stands where: in the call, in an entry and its usage, in a selection.
local NOW_MS, EPOCH, POSITION, LEASE_MS, BATCH, SKIPS, ENTRIES, SELECTIONS = 1, 2, 3, 4, 5, 6, 7, 8
local NUMBER, SERVICE_ID, OUTCOME, AGE_MS, USAGE, COOLDOWN_MS, FIRST_TOKEN_US, STREAM_US = 1, 2, 3, 4, 5, 6, 7, 8
local USED_INPUT, USED_OUTPUT, USED_CACHED, USED_CREATION, USED_REASONING = 1, 2, 3, 4, 5
local REVISION, DRAW, TO_RESERVE, DEADLINE_MS, AFFINITY_MS, RULE, PARTITION, ONLY, EXCLUDED = 2, 3, 4, 5, 6, 7, 8, 9, 10
local BARRED = 12
local metered_text = {[0] = '0 ', '1 ', '2 ', '3 '}
-- Whether an outcome is a failure, and what it says of the service: all others say nothing.
local is_failure = {
  rate_limited = true, unauthorized = true, overloaded = true, failed = true, success = false, rejected = false,
  cancelled = false, abandoned = false,
}
local verdicts = {success = 'success', unauthorized = 'failure', overloaded = 'failure', failed = 'failure'}
-- What the call is of. `texts` is what each name holds: false for nothing, '' for what this batch has taken away;
-- `holdings` is that of each entry. `asked` is the selection that is being decided.
local call = {
  now = 0, batch = 0, pool = false, state = false, rules = {}, parts = {}, entries = false, holdings = {},
  selections = false, names = {'last'}, pins = 0, texts = {}, gone = {}, held = {}, asked = false, view = false,
}

-- What has another type than it should is an error here: a value is compared only with its like. Numbers of 0 and more
-- are whole when nothing is left of all of them together.
local function is_entry(entry)
  local number, service, outcome, age = entry[NUMBER], entry[SERVICE_ID], entry[OUTCOME], entry[AGE_MS]
  local usage, cooldown, first, stream = entry[USAGE], entry[COOLDOWN_MS], entry[FIRST_TOKEN_US], entry[STREAM_US]
  local input, output, cached = usage[USED_INPUT], usage[USED_OUTPUT], usage[USED_CACHED]
  local creation, reasoning = usage[USED_CREATION], usage[USED_REASONING]
  return is_failure[outcome] ~= nil and (service > '' or (service == '' and outcome == 'abandoned'))
    and number >= 0 and age >= 0 and cooldown >= 0 and first >= 0 and stream >= 0
    and input >= 0 and output >= 0 and cached >= 0 and creation >= 0 and reasoning >= 0
    and number + age + cooldown + first + stream + input + output + cached + creation + reasoning <= MOST_WHOLE
    and number % 1 + age % 1 + cooldown % 1 + first % 1 + stream % 1 + input % 1 + output % 1 + cached % 1
    + creation % 1 + reasoning % 1 == 0
end

-- Takes ids for what the excluded are looked up by, too.
local function exclude(ids, excluded) -- apart: special
  for i = 1, #ids do
    if type(ids[i]) ~= 'string' then return false end
    excluded[ids[i]] = true
  end
  return true
end

local function is_selection(selection)
  local number, revision, draw = selection[NUMBER], selection[REVISION], selection[DRAW]
  local reserved, deadline, affinity = selection[TO_RESERVE], selection[DEADLINE_MS], selection[AFFINITY_MS]
  local excluded, barred = selection[EXCLUDED], selection[BARRED]
  return number > 0 and revision > 0 and draw >= 0 and draw < 4294967296 and reserved >= 0 and deadline >= 0
    and affinity >= 0 and number + revision + reserved + deadline + affinity <= MOST_WHOLE
    and number % 1 + revision % 1 + draw % 1 + reserved % 1 + deadline % 1 + affinity % 1 == 0
    and selection[RULE] >= '' and selection[PARTITION] >= '' and selection[ONLY] >= ''
    and type(excluded) == 'table' and (excluded[1] == nil or exclude(excluded, excluded))
    and (barred == nil or type(barred) == 'table' and (barred[1] == nil or exclude(barred, excluded)))
end

-- The numbers that the call begins with.
local function has_numbers(parts)
  local now, epoch, position, lease, batch = parts[NOW_MS], parts[EPOCH], parts[POSITION], parts[LEASE_MS], parts[BATCH]
  return now >= 0 and epoch >= 0 and position >= 0 and lease > 0 and batch >= 0
    and now + epoch + position + lease + batch <= MOST_WHOLE
    and now % 1 + epoch % 1 + position % 1 + lease % 1 + batch % 1 == 0
end

-- Takes the call apart, and gives it, nil where something is malformed; where what should be there is not, it is an
-- error. All of it is looked at before anything is done.
local function read_call()
  local parts, more = cmsgpack.unpack(ARGV[2])
  local entries, selections, names = parts[ENTRIES], parts[SELECTIONS], call.names
  local count, asked = #entries, #selections
  if more ~= nil or not has_numbers(parts) or type(parts[SKIPS]) ~= 'boolean'
      or (count == 0 and next(entries) ~= nil) or (asked == 0 and next(selections) ~= nil) then
    return nil
  end
  call.batch, call.entries, call.selections = parts[BATCH], entries, selections
  for i = 1, count do
    local entry = entries[i]
    if not is_entry(entry) then return nil end
    names[i + 1] = entry[NUMBER]
  end
  for i = 1, asked do
    local selection = selections[i]
    if not is_selection(selection) then return nil end
    names[count + 1 + i] = selection[NUMBER]
    if selection[AFFINITY_MS] > 0 then
      call.pins = call.pins + 1
      selection.pin_key = KEYS[5 + call.pins]
    end
  end
  return parts
end

-- Why a call is refused.
local function fault_of(parts) -- apart: special
  local taken, entries, selections = #call.names, call.entries, call.selections
  if parts then
    if call.pins ~= #KEYS - 5 then return 'one pin for each affinity' end
    return call.batch == 0 and #entries > 0 and 'entries without a batch' or 'a batch or selections, 64 at most'
  end
  if not entries then return 'malformed argument' end
  if taken <= #entries then return 'entry ' .. taken .. ' is malformed' end
  return 'selection ' .. taken - #entries .. ' is malformed'
end

-- Reads all rules and partitions that are asked for; the services that their cursors stand on.
local function open_rules()
  local fields, count, cursors, selections, rules, parts = {}, 0, {}, call.selections, call.rules, call.parts
  for i = 1, #selections do
    local selection = selections[i]
    local rule, id = selection[RULE], selection[PARTITION]
    if not rules[rule] then
      count = count + 1
      fields[count], rules[rule] = 'rule:' .. rule, count
    end
    if not parts[id] then
      fields[count + 1], fields[count + 2], parts[id] = 'tactic:' .. id, 'partition:' .. id, count + 1
      count = count + 2
    end
  end
  local values = redis.call('HMGET', KEYS[2], unpack(fields))
  for rule, place in pairs(rules) do rules[rule] = parse_rule(values[place]) end
  for id, place in pairs(parts) do
    local part = parse_partition(KEYS[2], id, values[place], values[place + 1])
    if part.current then cursors[#cursors + 1] = part.cursor end
    part.choose, parts[id] = tactic_named(part.tactic), part
  end
  return cursors
end

-- == the end of attempts

-- What each name holds that is settled, and the services to be read. A name that comes twice holds it once.
local function find_holdings()
  local ids, count, entries, texts, gone, holdings = {}, 0, call.entries, call.texts, call.gone, call.holdings
  for i = 1, #entries do
    local entry = entries[i]
    local number, id = entry[NUMBER], entry[SERVICE_ID]
    local text = texts[number]
    local holding = text and (read_holding(text) or read_lost(text)) or false
    holdings[i] = holding
    if holding then
      id, texts[number], gone[#gone + 1] = holding.id, '', number
    end
    if id ~= '' then
      count = count + 1
      ids[count] = id
    end
  end
  return ids
end

-- An attempt that was never sent: what it held is given back, or its name is remembered.
local function abandon(number, service) -- apart: special
  if service then
    service.totals[ABANDONED], service.is_changed = service.totals[ABANDONED] + 1, true
  else
    local text, held = string.format('x %d', call.now + ABANDONED_MS), call.held
    held[#held + 1] = number
    held[#held + 1], call.texts[number] = text, text
  end
end

local function count_usage(entry, service, outcome, age_ms)
  local usage, totals, now = entry[USAGE], service.totals, call.now
  local input, output = usage[USED_INPUT], usage[USED_OUTPUT]
  totals[REQUESTS] = totals[REQUESTS] + 1
  if is_failure[outcome] then totals[FAILURES] = totals[FAILURES] + 1 end
  totals[INPUT], totals[OUTPUT] = totals[INPUT] + input, totals[OUTPUT] + output
  totals[CACHED] = totals[CACHED] + usage[USED_CACHED]
  totals[CACHE_CREATION] = totals[CACHE_CREATION] + usage[USED_CREATION]
  totals[REASONING] = totals[REASONING] + usage[USED_REASONING]
  if now - age_ms > totals[LAST_USED] + 0 then totals[LAST_USED] = now - age_ms end
  service.is_changed = true
  add_window_tokens(service, input, output, now, age_ms)
  local cooldown_ms = entry[COOLDOWN_MS]
  if cooldown_ms > 0 then service.cooldown = math.max(service.cooldown, now - age_ms + cooldown_ms) end
  if age_ms == 0 and outcome == 'success' then
    add_latency(service, entry[FIRST_TOKEN_US], entry[STREAM_US], output, now)
  end
end

-- What a minute counts of an attempt: what was reported; of one that was served and reported nothing, as when its
-- client left, what it had reserved. Otherwise such clients would have no limit.
local function minute_tokens(entry, holding) -- apart: limits
  local usage, outcome = entry[USAGE], entry[OUTCOME]
  local tokens = usage[USED_INPUT] + usage[USED_OUTPUT]
  local is_served = outcome == 'success' or outcome == 'cancelled'
  return tokens == 0 and is_served and holding.reserved or tokens
end

local function record_settle(entry, place, before, id, service) -- apart: special
  local usage = entry[USAGE]
  record_event(call.pool, 'settle', {
    'worker', ARGV[1], 'number', whole(entry[NUMBER]), 'batch', whole(call.batch), 'place', place,
    'service', id, 'outcome', entry[OUTCOME], 'age_ms', whole(entry[AGE_MS]),
    'input', whole(usage[USED_INPUT]), 'output', whole(usage[USED_OUTPUT]), 'cached', whole(usage[USED_CACHED]),
    'cache_creation', whole(usage[USED_CREATION]), 'reasoning', whole(usage[USED_REASONING]),
    'cooldown_ms', whole(entry[COOLDOWN_MS]), 'first_token_us', whole(entry[FIRST_TOKEN_US]),
    'stream_us', whole(entry[STREAM_US]), 'before', before, 'after', service and event_text(service) or '',
  })
end

-- Applies the entry at a place of the batch.
local function settle(entry, place)
  local holding, outcome, age_ms, pool = call.holdings[place], entry[OUTCOME], entry[AGE_MS], call.pool
  local id = holding and holding.id or entry[SERVICE_ID]
  local service = call.state.services[id]
  local before = advance(pool) and (service and event_text(service) or '')
  local is_lost = holding and holding.is_lost
  if is_lost then
    uncount_lost(service, holding)
  elseif holding then
    release(service, holding)
  end
  if outcome == 'abandoned' then
    abandon(entry[NUMBER], service)
  else
    count_usage(entry, service, outcome, age_ms)
    if holding and not is_lost and holding.is_metered and age_ms < 60000 then
      add_minute_tokens(service, holding, minute_tokens(entry, holding), call.now)
    end
  end
  if service and not is_lost then
    local verdict = age_ms == 0 and verdicts[outcome] or ''
    settle_breaker(pool, service, id, provider_numbers(service), verdict, holding and holding.probe or 0)
  end
  if before then record_settle(entry, place, before, id, service) end
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
  local asked = call.asked
  if line.looked_at_by == asked then return line.status end
  local id, only, status, wait = line.id, asked[ONLY], '', nil
  if not line.is_active then
    status = 'inactive'
  elseif asked[EXCLUDED][id] or (only ~= '' and only ~= id) then
    status = 'excluded'
  else
    local service = state_of(line)
    local meter = service.meter
    if line.has_limits then wait = limit_wait(line, service, asked[TO_RESERVE], call.now) end
    if meter.has_limits then
      wait = longer(wait, limit_wait(provider_limits(meter), meter, asked[TO_RESERVE], call.now))
    end
    if wait then
      status = 'limited'
    elseif is_open(service) and has_breaker(provider_numbers(service)) then
      status = 'broken'
    elseif service.cooldown > call.now then
      status = 'cooling'
    end
  end
  line.looked_at_by, line.status, line.wait = asked, status, wait
  return status
end

local function is_candidate(line)
  return status_of(line) == ''
end

-- Chooses by the partition's tactic among those that may serve: the line, streak, reason and memory, nil when there is
-- none. The first of them counts as the cursor where there is none.
local function choose(part, may_serve)
  local cursor, current, was_streak, view = part.cursor, part.current, part.streak, call.view
  view.part, view.may_serve, view.found = part, may_serve, false
  if cursor == '' then
    local first = view.after('')
    if not first then return nil end
    part.cursor, part.current, part.streak = first.id, first, 0
  end
  local id, streak, reason, memory = part.choose(part, view, call.asked[DRAW])
  local found = view.found
  local line = part.current
  if id ~= part.cursor or not line then
    line = id and (found and found.id == id and found or find_line(part, id))
  end
  if cursor == '' then part.cursor, part.current, part.streak = cursor, current, was_streak end
  if not line then return nil end
  return line, streak, reason, memory or part.memory
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

-- The tactic's choice among the candidates of the tier that serves now, and behind it tier and hold. A lower one serves
-- only while no higher has a candidate, and for a minute at least.
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
  local line, streak, reason, memory = choose(part, of_tier(is_candidate, tier))
  return line, streak, reason, memory, tier, hold
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
  local event = {
    'worker', ARGV[1], 'number', whole(selection[NUMBER]), 'rule', selection[RULE], 'partition', selection[PARTITION],
    'revision', whole(selection[REVISION]), 'tactic', part.tactic, 'draw', whole(selection[DRAW]),
    'reserved', whole(selection[TO_RESERVE]), 'deadline_ms', whole(call.now + selection[DEADLINE_MS]),
    'excluded', table.concat(selection[EXCLUDED], '\n'), 'affinity_ms', whole(selection[AFFINITY_MS]),
    'only', selection[ONLY], 'pin', selection.pin or '',
  }
  local barred = selection[BARRED]
  if barred and barred[1] then event[#event + 1], event[#event + 2] = 'barred', table.concat(barred, '\n') end
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

-- The service that the session is pinned to, when it may be picked. A limit or a cooldown passes, and what it cannot
-- serve may be this request alone: the pin stands meanwhile (selection.keeps_pin); all else ends it.
local function pinned(part, selection) -- apart: special
  selection.pin = redis.call('GET', selection.pin_key) or ''
  if selection.pin == '' then return nil end
  local line = find_line(part, selection.pin)
  local status = line and status_of(line) or 'inactive'
  if status == '' then return line end
  selection.keeps_pin = status == 'limited' or status == 'cooling' or status == 'excluded'
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
  if open == 0 then return {'none', selection[EXCLUDED][1] and has_active and 'tried' or 'inactive', 0} end
  if not next(within) then return {'none', 'limited', is_never and LIMIT_NEVER or wait} end
  if selection[EXCLUDED][1] then return {'none', 'tried', 0} end
  if part.refuses then return refuse(within) end
  local function may_serve(line) return within[line.id] ~= nil end
  if part.top >= 0 then may_serve = of_tier(may_serve, (least_tier(part, may_serve, -1))) end
  local line = choose(part, may_serve)
  return take(selection, rule, part, line, 'exhausted', part.streak, 0)
end

local function pick_only(selection, rule, part) -- apart: special
  if selection[EXCLUDED][1] then return {'none', 'tried', 0} end
  local line = find_line(part, selection[ONLY])
  if not line or status_of(line) ~= '' then return without_candidate(selection, rule, part) end
  return take(selection, rule, part, line, 'pinned', part.streak, 0)
end

-- Picks what was chosen: counts it, and moves the cursor if there is a memory. `pins` says whether to pin the session.
local function take(selection, rule, part, line, reason, streak, is_switch, memory, pins)
  local id, number, pool, held = line.id, selection[NUMBER], call.pool, call.held
  local service = state_of(line)
  local is_recorded, before, sample = advance(pool), '', nil
  local cursor, streak_before = part.cursor, part.streak
  if is_recorded then
    before = pick_text(service)
    local is_by_tactic = reason ~= 'pinned' and reason ~= 'probe'
    sample = pool.record == 'sampled' and is_by_tactic and seen_by_tactic(part) or {}
  end
  local metered = count_pick(selection[TO_RESERVE], line, service)
  local probe = reason == 'probe' and send_probe(service, id) or '0'
  if memory then
    if part.current ~= line then move_cursor(part, line) end
    part.streak, part.memory, part.is_changed = streak, memory, true
  end
  local budget = rule.budget + (selection[EXCLUDED][1] and -RETRY_COST or rule.retry_permille)
  if budget > MOST_BUDGET then budget = MOST_BUDGET end
  if budget ~= rule.budget then rule.budget, rule.is_unused = budget, false end
  local seq, at = rule.seq + 1, #held
  rule.seq, rule.is_changed = seq, true
  local text = string.format('h %d %d ', selection[TO_RESERVE], call.now + selection[DEADLINE_MS])
    .. metered_text[metered] .. probe .. ' ' .. id
  held[at + 1], held[at + 2], call.texts[number] = number, text, text
  if pins then redis.call('SET', selection.pin_key, id, 'PX', whole(selection[AFFINITY_MS])) end
  if is_recorded then
    record_pick(selection, part, {
      'service', id, 'reason', reason, 'seq', whole(seq), 'cursor', cursor, 'streak_before', streak_before,
      'streak', streak, 'is_switch', is_switch, 'meters', metered, 'before', before,
      'after', pick_text(service),
    }, sample)
  end
  return {'pick', id, reason, seq, pool.epoch, pool.position, streak, is_switch}
end

local function pick(selection, rule, part)
  local is_retry, pin_key, cursor = selection[EXCLUDED][1] ~= nil, selection.pin_key, part.cursor
  if is_retry and rule.budget < RETRY_COST then return {'none', 'budget', 0} end
  if selection[ONLY] ~= '' then return pick_only(selection, rule, part) end
  if pin_key and not is_retry then
    local line = pinned(part, selection)
    if line then
      local is_switch = cursor ~= '' and cursor ~= line.id and 1 or 0
      return take(selection, rule, part, line, 'pinned', part.streak, is_switch, nil, true)
    end
  end
  if call.pool.broken ~= '' and not is_retry then
    local line = find_probe(part)
    if line then return take(selection, rule, part, line, 'probe', part.streak, 0) end
  end
  local line, streak, reason, memory, tier, hold
  if part.top < 0 then
    line, streak, reason, memory = choose(part, is_candidate)
  else
    line, streak, reason, memory, tier, hold = choose_in_tier(part)
  end
  if not line then return without_candidate(selection, rule, part) end
  if is_retry then return take(selection, rule, part, line, 'retry', part.streak, 0) end
  if tier then part.tier, part.hold = tier, hold end
  local is_switch = cursor ~= '' and cursor ~= line.id and 1 or 0
  return take(selection, rule, part, line, reason, streak, is_switch, memory, pin_key and not selection.keeps_pin)
end

-- True for a name that is in use, or was given up less than a minute ago; one call may have it twice.
local function is_taken(text)
  if not text or text == '' then return false end
  local until_ms = string.match(text, '^x (%d+)$')
  return not until_ms or until_ms + 0 > call.now
end

local function decide(selection)
  local rule, part = call.rules[selection[RULE]], call.parts[selection[PARTITION]]
  local revision = selection[REVISION]
  if is_taken(call.texts[selection[NUMBER]]) then return {'abandoned'} end
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

local is_read, parts = pcall(read_call)
if not is_read or not parts or call.pins ~= #KEYS - 5 or #call.selections > 64
    or call.batch == 0 and (call.entries[1] or not call.selections[1]) then
  return redis.error_reply('BALANCER tick: ' .. fault_of(is_read and parts))
end
local batch, lease_ms = call.batch, parts[LEASE_MS]
call.state = open_services(KEYS[1], true)

local entries, selections, names, texts = call.entries, call.selections, call.names, call.texts
local known = redis.call('HMGET', KEYS[3], unpack(names))
for i = 2, #names do texts[names[i]] = known[i] end
local last, renewed = string.match(known[1] or '0 0', '^(%d+) +(%d+)$')
last, renewed = last + 0, renewed + 0
local is_gap = batch > last + 1 and not parts[SKIPS]
if is_gap and not selections[1] then return {{'gap', last, 0, 0, 0}} end

local now, is_applied, ids, cursors, answers = clock(parts[NOW_MS]), batch > last and not is_gap, {}, nil, {false}
call.now = now
if is_applied then ids = find_holdings() end
if selections[1] then
  cursors = open_rules()
  call.view = new_view({
    part = false, may_serve = false, found = false, state_of = state_of, counts = counts, state = call.state,
  })
end
local fields = load_services(call.state, ids, {'place', 'record', 'broken'}, cursors)
local pool = open_pool(fields, KEYS[5], parts[EPOCH], parts[POSITION], now)
call.pool = pool
if is_applied then
  for place = 1, #entries do settle(entries[place], place) end
  last = batch
end
for i = 1, #selections do answers[i + 1] = decide(selections[i]) end

-- First of all what takes memory, so that a server that has none refuses all of it. The lease is written when a third
-- of it has passed, and then the holdings are kept from expiring; a short one is written at once.
local renews, is_new = now - renewed >= lease_ms / 3 or renewed > now or lease_ms < 1000, false
if renews then is_new = redis.call('ZADD', KEYS[4], string.format('%d', now + lease_ms), ARGV[1]) > 0 end
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
