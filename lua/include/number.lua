local MOST_WHOLE = 9007199254740991

-- Whole numbers as text: tostring would round beyond 14 digits.
local function whole(value) -- apart: rare
  return string.format('%.0f', value)
end

-- The argument as a whole number of at least `least`, or nil. It has one spelling: some numbers become names of fields.
local function to_whole(text, least)
  local value = string.find(text or '', '^%d+$') and tonumber(text)
  if not value or value < least or value > MOST_WHOLE then return nil end
  if string.byte(text) == 48 and text ~= '0' then return nil end
  return value
end

-- True when a comes before b, byte by byte: the server compares strings by its locale.
local function is_before(a, b) -- apart: rare
  for i = 1, math.min(#a, #b) do
    local x, y = string.byte(a, i), string.byte(b, i)
    if x ~= y then return x < y end
  end
  return #a < #b
end
