-- Whole numbers as text: tostring would round beyond 14 digits.
local function whole(value)
  return string.format('%.0f', value)
end

-- The argument as a whole number of at least `least`, or nil. It has one spelling: some numbers become names of fields.
local function to_whole(text, least)
  local digits = string.match(text or '', '^[1-9]%d*$') or string.match(text or '', '^0$')
  local value = tonumber(digits)
  if value and value >= least and value < 9007199254740992 then return value end
  return nil
end
