-- For the expanded scripts, as Redis gets them: `make lint` writes and checks them.
std = 'lua51'
-- Functions are called by way of their table there; the lines of the sources themselves a test counts.
max_line_length = false

-- What Redis and Valkey give a script. KEYS and ARGV are read, never written.
read_globals = {'redis', 'cjson', 'cmsgpack', 'bit', 'struct', 'KEYS', 'ARGV'}

-- A script keeps every name local: a global would outlive the call, and the server refuses it.
allow_defined = false
allow_defined_top = false

-- An include brings all of its functions; a script that calls some of them leaves the others unused.
ignore = {
  '211/.*', -- unused local: it cannot tell an include's function from a forgotten one
}
