-- luacheck reads the assembled library: `python -m tools.assemble_lua --check`.
-- The server runs Lua 5.1 and adds `redis`, `bit` and `cmsgpack`.
std = "lua51"
read_globals = { "redis", "bit", "cmsgpack" }
-- Arguments are unpacked in the order of a function's header, also those that it does not use.
unused_secondaries = false
max_line_length = 120
