-- include: candidates
-- include: number

-- A rule and its partitions as tick reads them, and what a pick changes of them. `rule:<rule>` is
-- `revision seq retry_permille budget`, the budget -1 as long as it is full and was never used; `tactic:<p>` is
-- `tactic top refuses params`, the parameters `name value` joined by `;`; `partition:<p>` has a line of
-- `streak tier hold`, one of the cursor, one of its numbers, and behind them what the tactic remembers.
local NEW_RULE, NEW_TACTIC, NEW_PARTITION = '0 0 0 -1', ' -1 0 ', '0 -1 0\n\n\n'
local MOST_BUDGET = 100000

local function parse_rule(text)
  local revision, seq, retry_permille, budget = string.match(text or NEW_RULE, '^(%d+) (%d+) (%d+) (-?%d+)$')
  local rule = {
    revision = revision + 0, seq = seq + 0, retry_permille = retry_permille + 0, budget = budget + 0, is_unused = false,
    is_changed = false,
  }
  if rule.budget < 0 then
    rule.budget, rule.is_unused = rule.retry_permille > 0 and MOST_BUDGET or 0, true
  end
  return rule
end

local function rule_text(rule)
  local budget = rule.is_unused and -1 or rule.budget
  return string.format('%d %d %d %d', rule.revision, rule.seq, rule.retry_permille, budget)
end

local function parse_partition(key, id, tactic_text, text)
  local tactic, top, refuses, params_text = string.match(tactic_text or NEW_TACTIC, '^(%S*) (-?%d+) (%d) (.*)$')
  local streak, tier, hold, cursor, line, memory = string.match(text or NEW_PARTITION,
    '^(%d+) (-?%d+) (%d+)\n([^\n]*)\n([^\n]*)\n(.*)$')
  local params = {}
  for name, value in string.gmatch(params_text, '([%l_]+) (%d+)') do params[name] = value + 0 end
  return {
    key = key, id = id, tactic = tactic, params_text = params_text, params = params, top = top + 0,
    refuses = refuses == '1', streak = streak + 0, tier = tier + 0, hold = hold + 0, cursor = cursor, line_text = line,
    current = parse_current(cursor, line), memory = memory, is_changed = false, choose = false,
  }
end

local function partition_text(part)
  return string.format('%d %d %d\n', part.streak, part.tier, part.hold) .. part.cursor .. '\n'
    .. (part.line_text or current_text(part.current)) .. '\n' .. part.memory
end

-- All its services, as text and as lines; read when they are first asked for. `places` has the lines that were read one
-- by one, by where they begin, and `behind` where the line behind that of an id begins.
local function services_text(part) -- apart: reading
  if not part.services_text then
    part.services_text = redis.call('HGET', part.key, 'services:' .. part.id) or ''
    part.places, part.behind = {}, {}
  end
  return part.services_text
end

local function lines_of(part) -- apart: reading
  part.lines = part.lines or parse_services(services_text(part))
  return part.lines
end

-- The line that begins at a place, nil at the end; read once a call.
local function line_in_place(part, at) -- apart: reading
  local line = part.places[at]
  if line then return line end
  line = line_at(part.services_text, at)
  if line then part.places[at], part.behind[line.id] = line, line.following end
  return line
end

-- Where the line behind that of an id begins; false without one.
local function place_behind(part, id) -- apart: reading
  local text = services_text(part)
  local at = part.behind[id]
  if at == nil then
    local _, following = find_numbers(text, id)
    at = following or false
    part.behind[id] = at
  end
  return at
end

local function find_line(part, id) -- apart: reading
  if part.current and id == part.cursor then return part.current end
  return line_of(services_text(part), id)
end

-- The tier that serves; nil in a partition of one tier.
local function serving_tier(part) -- apart: rare
  if part.top < 0 then return nil end
  return part.tier >= 0 and part.tier or part.top
end

local function of_tier(may_serve, tier) -- apart: rare
  return function(line) return line.tier == tier and may_serve(line) end
end

-- The least tier of those that may serve, nil without one, and whether one of `tier` may.
local function least_tier(part, may_serve, tier) -- apart: rare
  local least, has_tier = nil, false
  for _, line in ipairs(lines_of(part)) do
    if may_serve(line) then
      least = math.min(least or line.tier, line.tier)
      has_tier = has_tier or line.tier == tier
    end
  end
  return least, has_tier
end

-- Sets the cursor to a line.
local function move_cursor(part, line)
  part.cursor, part.current, part.line_text = line.id, line, false
end
