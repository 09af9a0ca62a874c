-- Appends to the log of changes what was done without publishing a revision.
-- KEYS[1] changes       the log, a stream
-- ARGV[1] now_ms        0 for the server's time
-- ARGV[2] change        JSON
-- ARGV[3] kept          how many changes are kept
-- ARGV[4] age_ms        for how long
-- Returns {'noted', id}.
-- include: clock
-- include: changes

local oldest_ms = clock(tonumber(ARGV[1])) - tonumber(ARGV[4])
return {'noted', note_change(KEYS[1], ARGV[2], tonumber(ARGV[3]), oldest_ms)}
