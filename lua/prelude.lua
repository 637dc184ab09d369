-- The table `ff`, which all parts of the library share, and what every part uses.
--
-- No global is read while the library loads: Valkey 9 hides almost all of them at that time. `redis.call`, `string`,
-- `tonumber` and the rest are named inside functions only.
-- Numbers leave as decimal integers ('%d') and stay at or below 2^53-1, the last integer a Lua number holds exactly.
-- Lua has no rollback: every function reads and checks everything before its first write.

local ff = {}

ff.MAX_INTEGER = 9007199254740991
ff.MAX_PAYLOAD = 65536
-- A call blocks the server until it returns: at about 1.5 us a frame, 1024 frames stay below 2 ms.
ff.MAX_FRAMES = 1024
ff.MAX_RUN_BYTES = 2097152
-- The field list of a stream entry is unpacked onto the Lua stack; this bound is far below the stack's limit.
ff.MAX_FIELDS = 32

-- Every key that Lua code spells. The first %s is the slot tag, `{fp:N}`; the table in ff_fast/keys.py names the others
-- and says what each key holds.
ff.KEYS = {
  core = 'ff:exec:%s:%s:core',
  payload = 'ff:exec:%s:%s:payload',
  result = 'ff:exec:%s:%s:result',
  tags = 'ff:exec:%s:%s:tags',
  usage = 'ff:exec:%s:%s:usage',
  usage_dedup = 'ff:exec:%s:%s:usage:dedup',
  history = 'ff:exec:%s:%s:history',
  children = 'ff:exec:%s:%s:children',
  waitpoints = 'ff:exec:%s:%s:waitpoints',
  tokens = 'ff:exec:%s:%s:tokens',
  signals = 'ff:exec:%s:%s:signals',
  signals_buffered = 'ff:exec:%s:%s:signals:buffered',
  signals_dedup = 'ff:exec:%s:%s:signals:dedup',
  suspension = 'ff:exec:%s:%s:suspension:current',
  suspension_signals = 'ff:exec:%s:%s:suspension:signals',
  attempt = 'ff:attempt:%s:%s:%s',
  summary = 'ff:attempt:%s:%s:%s:summary',
  stream = 'ff:stream:%s:%s:%s',
  live = 'ff:stream:%s:%s:%s:live',
  meta = 'ff:stream:%s:%s:%s:meta',
  waitpoint = 'ff:wp:%s:%s',
  signal = 'ff:signal:%s:%s',
  eligible = 'ff:idx:%s:lane:%s:eligible',
  timers = 'ff:idx:%s:timers',
  completions = 'ff:part:%s:completions',
  waitpoint_secrets = 'ff:sec:%s:waitpoint_hmac',
  flow = 'ff:flow:%s:%s',
  flow_members = 'ff:flow:%s:%s:members',
  flow_open = 'ff:flow:%s:%s:open',
}

-- The key of that name in ff.KEYS; `...` is what it names behind the slot tag.
function ff.key(name, slot_tag, ...)
  return string.format(ff.KEYS[name], slot_tag, ...)
end

-- The slot tag of a key, `{fp:N}`. All keys of one call share it.
function ff.slot_tag_of(key)
  return string.match(key, '%b{}')
end

-- A success. The status is OK, or a word that the function's header explains.
function ff.reply(status, ...)
  return { 1, status, ... }
end

function ff.ok(...)
  return { 1, 'OK', ... }
end

-- A refusal: a code that the function's header declares, and its details.
function ff.err(code, ...)
  return { 0, code, ... }
end

function ff.now_ms()
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end

-- The fields of a hash as a table; nil where there is no such key.
function ff.hash(key)
  local flat = redis.call('HGETALL', key)
  if #flat == 0 then
    return nil
  end
  local fields = {}
  for i = 1, #flat, 2 do
    fields[flat[i]] = flat[i + 1]
  end
  return fields
end

-- A non-negative integer, or nil. tonumber alone accepts '1e3', '0x10', ' 5 ' and 'inf'.
function ff.integer(text)
  if text and #text <= 16 and string.find(text, '^%d+$') then
    local number = tonumber(text)
    if number <= ff.MAX_INTEGER then
      return number
    end
  end
  return nil
end

function ff.text(number)
  return string.format('%d', number)
end

-- The ms, as text, and the sequence of an entry id.
function ff.split_id(id)
  local ms, sequence = string.match(id, '^(%d+)-(%d+)$')
  return ms, tonumber(sequence)
end

-- The number of frames in a run, which is a varint at its beginning; 1 where it is no run.
function ff.run_count(run)
  local low, high = string.byte(run, 1, 2)
  if low and low >= 128 and high and high < 128 then
    return low - 128 + 128 * high
  end
  return low and low > 0 and low < 128 and low or 1
end
