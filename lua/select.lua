-- Picks a service for each of 1 to 64 selections of one pool, in order, as if each were a call of its own.
-- KEYS[1] services      the pool's services
-- KEYS[2] partitions    the pool's place in its history, rules and partitions
-- KEYS[3] holdings      of the asking worker
-- KEYS[4] leases        of all workers
-- KEYS[5] decisions     the stream of events
-- ARGV[1] now_ms        0 for the server's clock
-- ARGV[2] worker        who asks
-- ARGV[3] epoch         the highest epoch and
-- ARGV[4] position      position in it that the worker has seen, 0 0 for none
-- ARGV[5] lease_ms      how long the worker's lease is renewed for
-- ARGV[6…] selections   number, rule, partition, revision, draw, reserved, deadline_ms (from now), excluded (how
--   many) and their ids
-- Returns an array for each selection, in order:
--   {'pick', service, reason, seq, epoch, position, streak, is_switch}, {'none'}, {'stale', revision}: a later revision
--   stands, {'define', revision}: this one is not known here, {'abandoned'}: the name was given up;
--   then {'pool', epoch, position, lost}.
-- include: clock
-- include: pool
-- include: service
-- include: candidates
-- include: tactic/round_robin
-- include: tactic/token_based
-- include: tactic/hybrid
-- include: tactic/random

local services_key, partitions_key, holdings_key = KEYS[1], KEYS[2], KEYS[3]
local leases_key, decisions_key = KEYS[4], KEYS[5]
local tactics = {round_robin = round_robin, token_based = token_based, hybrid = hybrid, random = random}
local service_fields = {'windows', 'in_flight', 'reserved', 'picks'}

local selections, names = {}, {}
local at = 6
while at <= #ARGV do
  local selection = {
    number = ARGV[at], rule = ARGV[at + 1], partition = ARGV[at + 2], revision = to_whole(ARGV[at + 3], 1),
    draw = to_whole(ARGV[at + 4], 0), reserved = to_whole(ARGV[at + 5], 0), deadline_ms = to_whole(ARGV[at + 6], 0),
    excluded = {},
  }
  local excluded = to_whole(ARGV[at + 7], 0)
  if not (to_whole(selection.number, 1) and selection.revision and selection.draw and selection.draw < 4294967296
      and selection.reserved and selection.deadline_ms and excluded and at + 7 + excluded <= #ARGV) then
    return redis.error_reply('BALANCER select: selection ' .. (#selections + 1) .. ' is malformed')
  end
  for i = at + 8, at + 7 + excluded do selection.excluded[ARGV[i]] = true end
  selection.is_retry = excluded > 0
  selections[#selections + 1] = selection
  names[#names + 1] = selection.number
  at = at + 8 + excluded
end
local now_arg, seen_epoch, seen_position = to_whole(ARGV[1], 0), to_whole(ARGV[3], 0), to_whole(ARGV[4], 0)
local lease_ms = to_whole(ARGV[5], 1)
if #selections < 1 or #selections > 64 then return redis.error_reply('BALANCER select: 1 to 64 selections') end
if not (now_arg and seen_epoch and seen_position and lease_ms) then
  return redis.error_reply('BALANCER select: malformed argument')
end

local now = clock(now_arg)
local pool = open_pool(partitions_key, decisions_key, seen_epoch, seen_position, now)
local known = redis.call('HMGET', holdings_key, unpack(names))
local services, rules, parts, held, taken, answers = {}, {}, {}, {}, {}, {}

local function load_rule(rule)
  if not rules[rule] then
    local values = redis.call('HMGET', partitions_key, 'revision:' .. rule, 'seq:' .. rule)
    rules[rule] = {revision = tonumber(values[1] or 0), seq = tonumber(values[2] or 0)}
  end
  return rules[rule]
end

local function load_part(id)
  if not parts[id] then
    local values = redis.call('HMGET', partitions_key, 'tactic:' .. id, 'request_threshold:' .. id,
      'token_threshold:' .. id, 'cursor:' .. id, 'window:' .. id, 'streak:' .. id)
    parts[id] = {
      tactic = values[1], request_threshold = tonumber(values[2] or 0), token_threshold = tonumber(values[3] or 0),
      cursor = values[4] or '', window = tonumber(values[5] or 0), streak = tonumber(values[6] or 0),
    }
  end
  return parts[id]
end

local function counts(id, length)
  local service = load_service(services, services_key, id, service_fields)
  local requests, tokens = window_counts(service.windows, length, now)
  return requests, tokens + service.reserved
end

local function services_text(partition)
  return redis.call('HGET', partitions_key, 'services:' .. partition) or ''
end

-- Chooses by the partition's tactic; nil when it has no candidate. A retry works on a copy of cursor and streak.
local function choose(part, selection)
  local view = candidates_of(part, selection.excluded, function() return services_text(selection.partition) end, counts)
  local before = {cursor = part.cursor, window = part.window, streak = part.streak}
  if part.cursor == '' then
    local first = view.after('')
    if not first then return nil end
    part.cursor, part.window, part.streak = first.id, first.window, 0
  end
  local id, streak, reason = tactics[part.tactic](part, view, selection.draw)
  local window = id and (id == part.cursor and part.window > 0 and part.window or view.find(id).window)
  part.cursor, part.window, part.streak = before.cursor, before.window, before.streak
  return id, streak, reason, window
end

-- What a sampled pick saw, so that it can be checked by itself: thresholds, services, and what each of them counted.
local function seen_by_tactic(part, partition)
  local text, lines = services_text(partition), {}
  for _, service in ipairs(parse_services(text)) do
    local requests, tokens = counts(service.id, service.window)
    lines[#lines + 1] = whole(requests) .. ' ' .. whole(tokens)
  end
  return {
    'request_threshold', whole(part.request_threshold), 'token_threshold', whole(part.token_threshold),
    'services', text, 'counts', table.concat(lines, '\n'),
  }
end

local function record_pick(selection, part, fields, sample)
  local excluded = {}
  for other in pairs(selection.excluded) do excluded[#excluded + 1] = other end
  local event = {
    'worker', ARGV[2], 'number', selection.number, 'rule', selection.rule, 'partition', selection.partition,
    'revision', whole(selection.revision), 'tactic', part.tactic, 'draw', whole(selection.draw),
    'reserved', whole(selection.reserved), 'deadline_ms', whole(now + selection.deadline_ms),
    'excluded', table.concat(excluded, '\n'),
  }
  for _, list in ipairs({fields, sample}) do
    for _, value in ipairs(list) do event[#event + 1] = value end
  end
  record_event(pool, 'pick', event)
end

local function pick(selection, rule, part)
  local id, streak, reason, window = choose(part, selection)
  if not id then return {'none'} end
  local service = load_service(services, services_key, id, service_fields)
  local is_recorded = advance(pool)
  local sample = is_recorded and pool.record == 'sampled' and seen_by_tactic(part, selection.partition) or {}
  local before = is_recorded and {part.cursor, part.streak, counters_text(service, service_fields)}
  local is_switch = 0
  if selection.is_retry then
    reason, streak = 'retry', part.streak
  else
    if part.cursor ~= '' and part.cursor ~= id then is_switch = 1 end
    part.cursor, part.window, part.streak, part.is_changed = id, window, streak, true
  end
  roll_windows(service.windows, now)
  for _, w in ipairs(service.windows) do w.requests = w.requests + 1 end
  service.in_flight = service.in_flight + 1
  service.reserved = service.reserved + selection.reserved
  service.picks = service.picks + 1
  service.is_changed = true
  rule.seq = rule.seq + 1
  rule.is_changed = true
  taken[selection.number] = true
  held[#held + 1] = selection.number
  held[#held + 1] = 'h ' .. whole(selection.reserved) .. ' ' .. whole(now + selection.deadline_ms) .. ' ' .. id
  if before then
    record_pick(selection, part, {
      'service', id, 'reason', reason, 'seq', whole(rule.seq), 'cursor', before[1], 'streak_before', before[2],
      'streak', streak, 'before', before[3], 'after', counters_text(service, service_fields),
    }, sample)
  end
  return {'pick', id, reason, rule.seq, pool.epoch, pool.position, streak, is_switch}
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
    local part = load_part(selection.partition)
    if rule.revision > selection.revision then
      answers[i] = {'stale', rule.revision}
    elseif rule.revision < selection.revision or not tactics[part.tactic] then
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
  end
end
for id, part in pairs(parts) do
  if part.is_changed then
    for _, name in ipairs({'cursor', 'window', 'streak'}) do
      set[#set + 1] = name .. ':' .. id
      set[#set + 1] = part[name]
    end
  end
end
if #set > 0 then redis.call('HSET', partitions_key, unpack(set)) end
if #held > 0 then redis.call('HSET', holdings_key, unpack(held)) end
save_services(services, services_key, service_fields)
redis.call('ZADD', leases_key, whole(now + lease_ms), ARGV[2])
close_pool(pool, partitions_key, {services_key, leases_key, decisions_key}, holdings_key)
answers[#answers + 1] = {'pool', pool.epoch, pool.position, pool.lost}
return answers
