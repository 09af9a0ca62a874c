-- Raises the fence of rules in one pool to a revision, with what tick needs to know of them; a lower or equal one is
-- passed over.
-- KEYS[1] services      the pool's services, and its place in its history
-- KEYS[2] partitions    the pool's rules and partitions
-- KEYS[3] decisions     the stream of events
-- ARGV[1] now_ms        0 for the server's clock
-- ARGV[2] epoch         the highest epoch and
-- ARGV[3] position      position in it that the caller has seen, 0 0 for none
-- ARGV[4] record        how events are recorded: off, sampled or full; empty leaves that as it is
-- ARGV[5] keep          events to keep in the stream, about
-- ARGV[6] revision      that says so: an older one than the last changes nothing
-- ARGV[7…] rules        JSON, one argument a rule: {rule, revision, retry_permille, partitions: [{id, tactic, params:
--   {name: number}, cursor, is_edit, refuses, services: [{id, active, window, weight, tier, rpm, tpm, in_flight,
--   cost}]}], windows: [{id, lengths}], providers: [{id, rpm, tpm, in_flight, failures, ratio_permille, min_requests,
--   window_ms, open_ms, successes}]}; no partitions is a tombstone; a cursor that is not empty is set by an edit
--   (is_edit 1), or where nothing is known of the partition, and starts a new streak, as a changed tactic does;
--   `windows` are all lengths that the rule's services have in the pool, in seconds
-- Returns {'raised', how many, epoch, position, lost}.
-- include: clock
-- include: pool
-- include: service
-- include: partition

local services_key, partitions_key, decisions_key = KEYS[1], KEYS[2], KEYS[3]
local line_fields = {'window', 'weight', 'tier', 'rpm', 'tpm', 'in_flight', 'cost'}
local is_limit = {rpm = true, tpm = true, in_flight = true}
local provider_fields = {
  'rpm', 'tpm', 'in_flight', 'failures', 'ratio_permille', 'min_requests', 'window_ms', 'open_ms', 'successes',
}

local now_arg, seen_epoch, seen_position = to_whole(ARGV[1], 0), to_whole(ARGV[2], 0), to_whole(ARGV[3], 0)
local record, keep, revision = ARGV[4], to_whole(ARGV[5], 1), to_whole(ARGV[6], 0)
local is_mode = {[''] = true, off = true, sampled = true, full = true}
if not (now_arg and seen_epoch and seen_position and is_mode[record] and keep and revision) then
  return redis.error_reply('BALANCER fence: malformed argument')
end
-- True when the value is a table whose fields have these types.
local function has(value, types)
  if type(value) ~= 'table' then return false end
  for name, kind in pairs(types) do
    if type(value[name]) ~= kind then return false end
  end
  return true
end

-- True when all items of the list pass.
local function all(list, passes)
  for _, item in ipairs(list) do
    if not passes(item) then return false end
  end
  return true
end

-- True when the value has an id that fits in a line, and whole numbers under these names, below zero only as limits.
local function has_numbers(value, names)
  return has(value, {id = 'string'}) and value.id ~= '' and not string.find(value.id, '\n', 1, true)
    and all(names, function(name)
      local number = value[name]
      return type(number) == 'number' and number % 1 == 0 and (number >= 0 or is_limit[name])
    end)
end

local function is_service(value)
  return has_numbers(value, line_fields) and (value.active == 0 or value.active == 1)
end

local function is_partition(value)
  if not has(value, {id = 'string', tactic = 'string', params = 'table', cursor = 'string', is_edit = 'number',
    refuses = 'number', services = 'table'}) then return false end
  for name, number in pairs(value.params) do
    if type(name) ~= 'string' or type(number) ~= 'number' then return false end
  end
  return all(value.services, is_service)
end

local function is_windows(value)
  return has(value, {id = 'string', lengths = 'table'})
    and all(value.lengths, function(length) return type(length) == 'number' end)
end

local function is_provider(value)
  return has_numbers(value, provider_fields)
end

local function is_rule(value)
  return has(value, {rule = 'string', revision = 'number', retry_permille = 'number', partitions = 'table',
    windows = 'table', providers = 'table'}) and value.retry_permille >= 0 and value.retry_permille % 1 == 0
    and all(value.partitions, is_partition)
    and all(value.windows, is_windows) and all(value.providers, is_provider)
end

local rules = {}
for at = 7, #ARGV do
  local is_json, rule = pcall(cjson.decode, ARGV[at])
  if not (is_json and is_rule(rule)) then
    return redis.error_reply('BALANCER fence: malformed rule ' .. (at - 6))
  end
  rules[#rules + 1] = rule
end

local now = clock(now_arg)
local state = open_services(services_key)
local pool = open_pool(load_services(state, {}, place_fields()), decisions_key, seen_epoch, seen_position, now)
local raised = 0

-- Whether nothing at all is known of the pool but its place: its history begins here.
local function is_blank()
  return redis.call('EXISTS', partitions_key) == 0 and #redis.call('HKEYS', services_key) <= 1
end

local function set_record()
  local was_keep, as_of = string.match(pool.record_text, ' (%d+) (-?%d+)$')
  if record == '' or revision < as_of + 0 then return end
  local text = string.format('%s %d %d', record, keep, revision)
  if record ~= pool.record or keep ~= was_keep + 0 then
    local origin = is_blank() and 1 or 0
    -- The last event of a record that ends, else the first of one that begins.
    if record == 'off' then record_event(pool, 'record', {'record', record, 'keep', keep, 'origin', origin}) end
    pool.record, pool.record_text = record, text
    record_event(pool, 'record', {'record', record, 'keep', keep, 'origin', origin})
  end
  redis.call('HSET', services_key, 'record', text)
end

set_record()

local function forget_partition(id)
  redis.call('HDEL', partitions_key, 'tactic:' .. id, 'partition:' .. id, 'services:' .. id)
end

-- The numbers of a table under these names, joined by blanks.
local function numbers_text(value, names)
  local numbers = {}
  for i, name in ipairs(names) do numbers[i] = whole(value[name]) end
  return table.concat(numbers, ' ')
end

local function params_text(params)
  local parts = {}
  for name, value in pairs(params) do parts[#parts + 1] = name .. ' ' .. whole(value) end
  table.sort(parts, is_before)
  return table.concat(parts, ';')
end

-- The services' lines; the numbers of `cursor` ('' if it is not active, nil if it is none of them); the least tier, -1
-- when all are of one.
local function text_of(services, cursor)
  local lines, current, least, most = {'\n'}, nil, math.huge, -1
  for i, service in ipairs(services) do
    local numbers = numbers_text(service, line_fields)
    lines[i + 1] = service.id .. '\t' .. service.active .. ' ' .. numbers .. '\n'
    if service.id == cursor then current = service.active == 1 and numbers or '' end
    least, most = math.min(least, service.tier), math.max(most, service.tier)
  end
  return table.concat(lines), current, least < most and least or -1
end

-- What the tactic remembers is of services in their order: ids, weights and tiers.
local function shape_of(text)
  local shape = {}
  for i, line in ipairs(parse_services(text)) do shape[i] = line.weight .. ' ' .. line.tier .. ' ' .. line.id end
  return table.concat(shape, '\n')
end

local function define_partition(new)
  local id = new.id
  local stored = redis.call('HMGET', partitions_key, 'tactic:' .. id, 'partition:' .. id, 'services:' .. id)
  local part, params = parse_partition(partitions_key, id, stored[1], stored[2]), params_text(new.params)
  if part.tactic ~= new.tactic or part.params_text ~= params then part.streak = 0 end
  if new.cursor ~= '' and (new.is_edit == 1 or not stored[1]) then part.cursor, part.streak = new.cursor, 0 end
  local services, current, top = text_of(new.services, part.cursor)
  if not current then part.cursor, part.streak = '', 0 end
  part.line_text = current or ''
  if part.tactic ~= new.tactic or shape_of(stored[3] or '') ~= shape_of(services) then
    part.tier, part.hold, part.memory = -1, 0, ''
  end
  redis.call('HSET', partitions_key, 'tactic:' .. id, new.tactic .. ' ' .. top .. ' ' .. new.refuses .. ' ' .. params,
    'partition:' .. id, partition_text(part), 'services:' .. id, services)
end

-- A provider's numbers, unless a later definition stands.
local function set_provider(provider, as_of)
  local field = 'provider_revision:' .. provider.id
  if as_of < tonumber(redis.call('HGET', services_key, field) or 0) then return end
  redis.call('HSET', services_key, field, whole(as_of), 'provider:' .. provider.id,
    numbers_text(provider, provider_fields))
end

-- Gives a service exactly these windows; those that it has already keep what they count. A definition that is older
-- than the last (a worker brings back what the pool has lost) does not know of all: it takes none away.
local function set_windows(id, lengths, as_of)
  local service, windows = load_service(state, id), {}
  local old = service.windows
  local latest = tonumber(redis.call('HGET', services_key, 'windows_revision:' .. id) or 0)
  if as_of < latest then
    local is_wanted = {}
    for _, length in ipairs(lengths) do is_wanted[length] = true end
    for _, w in ipairs(old) do
      if not is_wanted[w.length] then lengths[#lengths + 1] = w.length end
    end
    table.sort(lengths)
  end
  for _, length in ipairs(lengths) do
    local kept = {length = length, start = 0, requests = 0, tokens = 0, output = 0}
    for _, w in ipairs(old) do
      if w.length == length then kept = w end
    end
    windows[#windows + 1] = kept
  end
  service.windows, service.is_changed = windows, true
  redis.call('HSET', services_key, 'windows_revision:' .. id, math.max(latest, as_of))
end

for at, rule in ipairs(rules) do
  local stored = parse_rule(redis.call('HGET', partitions_key, 'rule:' .. rule.rule))
  if rule.revision > stored.revision then
    local kept, ids = {}, {}
    for i, part in ipairs(rule.partitions) do
      kept[part.id] = true
      ids[i] = part.id
    end
    for id in string.gmatch(redis.call('HGET', partitions_key, 'partitions:' .. rule.rule) or '', '[^\n]+') do
      if not kept[id] then forget_partition(id) end
    end
    for _, part in ipairs(rule.partitions) do define_partition(part) end
    for _, windows in ipairs(rule.windows) do set_windows(windows.id, windows.lengths, rule.revision) end
    for _, provider in ipairs(rule.providers) do set_provider(provider, rule.revision) end
    stored.revision, stored.retry_permille = rule.revision, rule.retry_permille
    if rule.retry_permille == 0 then stored.budget, stored.is_unused = 0, false end
    redis.call('HSET', partitions_key, 'rule:' .. rule.rule, rule_text(stored), 'partitions:' .. rule.rule,
      table.concat(ids, '\n'))
    raised = raised + 1
    advance(pool)
    record_event(pool, 'fence', {'rule', rule.rule, 'definition', ARGV[6 + at]})
  end
end

close_pool(pool, services_key, changed_fields(state), partitions_key, nil, true)
return {'raised', raised, pool.epoch, pool.position, pool.lost}
