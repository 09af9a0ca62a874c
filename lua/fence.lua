-- Raises the fence of rules in one pool to a revision, with what select needs to know of them; a lower or equal one is
-- passed over.
-- KEYS[1] services      the pool's services
-- KEYS[2] partitions    the pool's place in its history, rules and partitions
-- KEYS[3] decisions     the stream of events
-- ARGV[1] now_ms        0 for the server's clock
-- ARGV[2] epoch         the highest epoch and
-- ARGV[3] position      position in it that the caller has seen, 0 0 for none
-- ARGV[4] record        how events are recorded: off, sampled or full; empty leaves that as it is
-- ARGV[5] keep          events to keep in the stream, about
-- ARGV[6] revision      that says so: an older one than the last changes nothing
-- ARGV[7…] rules        JSON, one argument a rule: {rule, revision, partitions: [{id, tactic, request_threshold,
--   token_threshold, cursor, is_edit, services: [{id, active, window, weight}]}], windows: [{id, lengths}]}; no
--   partitions is a tombstone; a cursor that is not empty is set by an edit (is_edit 1), or where nothing is known of
--   the partition, and starts a new streak, as a changed tactic does; `windows` are all lengths that the rule's
--   services have in the pool, in seconds
-- Returns {'raised', how many, epoch, position, lost}.
-- include: clock
-- include: pool
-- include: window

local services_key, partitions_key, decisions_key = KEYS[1], KEYS[2], KEYS[3]
local part_fields = {'tactic', 'request_threshold', 'token_threshold', 'cursor', 'window', 'streak', 'services'}

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

local function is_service(value)
  return has(value, {id = 'string', active = 'number', window = 'number', weight = 'number'})
end

local function is_partition(value)
  return has(value, {id = 'string', tactic = 'string', request_threshold = 'number', token_threshold = 'number',
    cursor = 'string', is_edit = 'number', services = 'table'}) and all(value.services, is_service)
end

local function is_windows(value)
  return has(value, {id = 'string', lengths = 'table'})
    and all(value.lengths, function(length) return type(length) == 'number' end)
end

local rules = {}
for at = 7, #ARGV do
  local is_json, rule = pcall(cjson.decode, ARGV[at])
  if not (is_json and has(rule, {rule = 'string', revision = 'number', partitions = 'table', windows = 'table'})
      and all(rule.partitions, is_partition) and all(rule.windows, is_windows)) then
    return redis.error_reply('BALANCER fence: malformed rule ' .. (at - 6))
  end
  rules[#rules + 1] = rule
end

local now = clock(now_arg)
local pool = open_pool(partitions_key, decisions_key, seen_epoch, seen_position, now)
local raised = 0

-- Whether nothing at all is known of the pool but its place: its history begins here.
local function is_blank()
  return redis.call('EXISTS', services_key) == 0 and #redis.call('HKEYS', partitions_key) <= 2
end

local function set_record()
  local stored = tonumber(redis.call('HGET', partitions_key, 'record_revision') or -1)
  if record == '' or revision < stored then return end
  local is_changed = record ~= pool.record or keep ~= pool.keep
  if is_changed then
    local origin = is_blank() and 1 or 0
    -- The last event of a record that ends, else the first of one that begins.
    if record == 'off' then record_event(pool, 'record', {'record', record, 'keep', keep, 'origin', origin}) end
    pool.record, pool.keep = record, keep
    record_event(pool, 'record', {'record', record, 'keep', keep, 'origin', origin})
  end
  redis.call('HSET', partitions_key, 'record', record, 'keep', keep, 'record_revision', revision)
end

set_record()

local function forget_partition(id)
  for _, name in ipairs(part_fields) do redis.call('HDEL', partitions_key, name .. ':' .. id) end
end

local function define_partition(part)
  local stored = redis.call('HMGET', partitions_key, 'tactic:' .. part.id, 'request_threshold:' .. part.id,
    'token_threshold:' .. part.id, 'cursor:' .. part.id, 'streak:' .. part.id)
  local cursor, streak = stored[4] or '', tonumber(stored[5] or 0)
  local is_same_tactic = stored[1] == part.tactic and tonumber(stored[2] or -1) == part.request_threshold
    and tonumber(stored[3] or -1) == part.token_threshold
  if not is_same_tactic then streak = 0 end
  if part.cursor ~= '' and (part.is_edit == 1 or not stored[1]) then cursor, streak = part.cursor, 0 end
  local window, is_member, lines = 0, false, {}
  for _, service in ipairs(part.services) do
    lines[#lines + 1] = service.active .. ' ' .. service.window .. ' ' .. service.weight .. ' ' .. service.id .. '\n'
    if service.id == cursor then
      is_member = true
      if service.active == 1 then window = service.window end
    end
  end
  if not is_member then cursor, streak = '', 0 end
  local values = {
    part.tactic, part.request_threshold, part.token_threshold, cursor, window, streak, table.concat(lines),
  }
  local set = {}
  for i, name in ipairs(part_fields) do
    set[#set + 1] = name .. ':' .. part.id
    set[#set + 1] = values[i]
  end
  redis.call('HSET', partitions_key, unpack(set))
end

-- Gives a service exactly these windows; those that it has already keep what they count. A definition that is older
-- than the last (a worker brings back what the pool has lost) does not know of all: it takes none away.
local function set_windows(id, lengths, as_of)
  local field = 'windows:' .. id
  local old, windows = parse_windows(redis.call('HGET', services_key, field)), {}
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
  redis.call('HSET', services_key, field, windows_text(windows), 'windows_revision:' .. id, math.max(latest, as_of))
end

for at, rule in ipairs(rules) do
  local stored = tonumber(redis.call('HGET', partitions_key, 'revision:' .. rule.rule) or 0)
  if rule.revision > stored then
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
    redis.call('HSET', partitions_key, 'revision:' .. rule.rule, rule.revision, 'partitions:' .. rule.rule,
      table.concat(ids, '\n'))
    raised = raised + 1
    advance(pool)
    record_event(pool, 'fence', {'rule', rule.rule, 'definition', ARGV[6 + at]})
  end
end

close_pool(pool, partitions_key, {services_key, decisions_key}, nil)
return {'raised', raised, pool.epoch, pool.position, pool.lost}
