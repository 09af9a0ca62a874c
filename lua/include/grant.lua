-- include: number

-- A provider's grant: what the fleet knows of its OAuth tokens, one hash. States: `ready`; `asking`, from the moment
-- before the request for new tokens to the moment behind it; `lost`, `in_doubt`: the refresh token must not be used.

local GRANT_MS = 15552000000 -- 180 days

-- Says that the grant has changed: whoever follows it reads it again.
local function announce(grant_key, grants_key, provider)
  redis.call('HINCRBY', grants_key, provider, 1)
  redis.call('PEXPIRE', grants_key, GRANT_MS)
  redis.call('PEXPIRE', grant_key, GRANT_MS)
end

-- True when the family of that name is or was this grant's.
local function knows_seed(seeds, seed)
  for known in string.gmatch(seeds, '%S+') do
    if known == seed then return true end
  end
  return false
end
