-- Whole numbers as text: tostring would round beyond 14 digits.
local function whole(value)
  return string.format('%.0f', value)
end

-- The argument as a whole number of at least `least`, or nil.
local function to_whole(text, least)
  local value = tonumber(text)
  if value and value >= least and value % 1 == 0 and value < 9007199254740992 then return value end
  return nil
end
