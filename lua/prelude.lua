-- The table `ff`, shared by all parts of the library, and the helpers that every part uses.
--
-- No global is read while the library loads: Valkey 9 hides almost all of them at that time. `redis.call`, `string`,
-- `tonumber` and the rest are named inside functions only.
-- Numbers leave as decimal integers ('%d') and stay at or below 2^53-1, the last integer a Lua number holds exactly.
-- Lua has no rollback: every function reads and checks everything before its first write.

local ff = {}

ff.MAX_INTEGER = 9007199254740991
-- Of a frame. Each backend has a limit of its own up to this one.
ff.MAX_PAYLOAD = 1048576
ff.USUAL_PAYLOAD = 65536
-- Of a signal. A waitpoint keeps up to 10,000.
ff.MAX_SIGNAL = 65536
-- A call blocks the server until it returns: at about 1.5 us a frame, 1024 frames stay below 2 ms.
ff.MAX_FRAMES = 1024
ff.MAX_RUN_BYTES = 2097152
-- The last time of the head of an attempt, which has 13 digits for it.
ff.MAX_MS = 9999999999999
-- The meta hash of an attempt names the last batch with a larger entry of the log or the live window. Behind that id,
-- readers bound their answers by the number of entries.
ff.SMALL_LOG = 1024
ff.SMALL_LIVE = 16384
-- The field list of a stream entry is unpacked onto the Lua stack; this bound is far below the stack's limit.
ff.MAX_FIELDS = 32

-- Every key that Lua code spells, in the parts around its slot tag, `{fp:N}`, and its owner: an execution, an attempt
-- as `<execution id>:<index>`, a lane or a flow. The table in ff_fast/keys.py says what each key holds, and of which
-- type it is. A key in a lane's own slot has the lane as its slot tag. Parts are joined at half the price of
-- string.format, and the end of an execution needs some 30 keys.
ff.KEYS = {
  core = { 'ff:exec:', ':', ':core' },
  payload = { 'ff:exec:', ':', ':payload' },
  result = { 'ff:exec:', ':', ':result' },
  tags = { 'ff:exec:', ':', ':tags' },
  usage = { 'ff:exec:', ':', ':usage' },
  usage_dedup = { 'ff:exec:', ':', ':usage:dedup' },
  usage_recent = { 'ff:exec:', ':', ':usage:recent' },
  history = { 'ff:exec:', ':', ':history' },
  children = { 'ff:exec:', ':', ':children' },
  waitpoints = { 'ff:exec:', ':', ':waitpoints' },
  tokens = { 'ff:exec:', ':', ':tokens' },
  signals = { 'ff:exec:', ':', ':signals' },
  signals_buffered = { 'ff:exec:', ':', ':signals:buffered' },
  signals_dedup = { 'ff:exec:', ':', ':signals:dedup' },
  suspension = { 'ff:exec:', ':', ':suspension:current' },
  suspension_signals = { 'ff:exec:', ':', ':suspension:signals' },
  attempt = { 'ff:attempt:', ':', '' },
  summary = { 'ff:attempt:', ':', ':summary' },
  stream = { 'ff:stream:', ':', '' },
  live = { 'ff:stream:', ':', ':live' },
  head = { 'ff:stream:', ':', ':head' },
  meta = { 'ff:stream:', ':', ':meta' },
  eligible = { 'ff:idx:', ':lane:', ':eligible' },
  needs = { 'ff:idx:', ':lane:', ':needs' },
  leases = { 'ff:idx:', ':leases' },
  listed = { 'ff:idx:', ':listed' },
  ended = { 'ff:idx:', ':ended:', '' },
  queues = { 'ff:idx:', ':queues' },
  timers = { 'ff:idx:', ':timers' },
  completions = { 'ff:part:', ':completions' },
  waitpoint_secrets = { 'ff:sec:', ':waitpoint_hmac' },
  waitpoint_use = { 'ff:part:', ':waitpoints' },
  flow = { 'ff:flow:', ':', '' },
  flow_members = { 'ff:flow:', ':', ':members' },
  flow_open = { 'ff:flow:', ':', ':open' },
  lane_news = { 'ff:lane:', ':news:', '' },
  task = { 'ff:task:', ':', '' },
  task_events = { 'ff:task:', ':', ':events' },
  task_order = { 'ff:tasks:', ':order' },
  task_due = { 'ff:tasks:', ':due' },
  task_facts = { 'ff:tasks:', ':facts' },
}

-- The key of that name in ff.KEYS. A key of the partition itself has no owner.
function ff.key(name, slot_tag, owner)
  local parts = ff.KEYS[name]
  if owner then
    return parts[1] .. slot_tag .. parts[2] .. owner .. parts[3]
  end
  return parts[1] .. slot_tag .. parts[2]
end

-- The owner of a key of that name, as ff.key takes it.
function ff.owner_in(name, key)
  local parts = ff.KEYS[name]
  local _, tag_end = string.find(key, '%b{}')
  return string.sub(key, tag_end + #parts[2] + 1, -#parts[3] - 1)
end

-- What is published, on channels of sharded pub/sub. Most of them have the text of a key: the head key of an attempt,
-- the core key of an execution, the completions of a partition. The table in ff_fast/keys.py has them all.
ff.CHANNELS = {
  attempt = ff.KEYS.head,
  execution = ff.KEYS.core,
  leases = { 'ff:part:', ':leases' },
  completions = ff.KEYS.completions,
  task = ff.KEYS.task_events,
}

-- The kinds of messages, which are the first byte of each: on the channel of an attempt
--   F<id of the last frame> <body>           frames that are stored; without a body they are read
--   f<id of the last frame> <body>           frames that will be stored under these ids
--   E<id> <last visible sequence> <reason>   the end, with the id of its entry
--   L<ms>                                    the lease was renewed, and ends in so many ms
--   R                                        something else changed
-- and on the channel of an execution
--   S<state>                                 it has moved to the state
-- and on the channel of a partition's completions
--   C                                        there is a new record
-- and on the channel of a task
--   R                                        it was saved or removed
-- On the channel of a partition's leases a message has words: `<what> <execution id> <attempt index>`, from
-- ff.tell_holder.
-- Only a writer makes bodies and reads none: ff_fast/_hot/frames.pyx has their form.
ff.PUSH = { STORED = 'F', PUSHED = 'f', END = 'E', LEASE = 'L', CHANGED = 'R', STATE = 'S', COMPLETED = 'C' }

-- Publishes a message. A push is never the truth: a user who may not publish changes as much as any other, and readers
-- hear of it later.
function ff.publish(channel, message)
  redis.pcall('SPUBLISH', channel, message)
end

-- The types of the keys.
ff.TYPES = {
  core = 'hash', payload = 'string', result = 'string', tags = 'hash', usage = 'hash', usage_dedup = 'hash',
  usage_recent = 'hash', history = 'stream', children = 'set', waitpoints = 'hash', tokens = 'hash',
  signals = 'hash', signals_buffered = 'zset', signals_dedup = 'hash', suspension = 'hash',
  suspension_signals = 'list', attempt = 'hash', summary = 'hash', stream = 'stream', live = 'stream', head = 'string',
  meta = 'hash',
  eligible = 'zset', needs = 'set', leases = 'hash', timers = 'zset', completions = 'stream',
  listed = 'zset', ended = 'zset', queues = 'zset',
  waitpoint_secrets = 'hash', waitpoint_use = 'hash', flow = 'hash', flow_members = 'set', flow_open = 'zset',
  lane_news = 'zset', task = 'hash', task_events = 'stream', task_order = 'zset',
  task_due = 'zset', task_facts = 'hash',
}

-- Refuses the call because of foreign data, before its first write: `name` is the name of the key in ff.KEYS.
function ff.corrupt(name)
  error({ err = 'CORRUPT ' .. name })
end

-- Refuses the call where the key exists and is of another type than its name in ff.KEYS says. A command that meets a
-- key of another type fails, and must not fail behind the first write: a key that the call has not read is asked here.
function ff.expect(name, key)
  local kind = redis.call('TYPE', key).ok
  if kind ~= ff.TYPES[name] and kind ~= 'none' then
    ff.corrupt(name)
  end
end

-- What foreign data keeps from being done is tried again after this time, and not in every round.
ff.DEFER_MS = 60000

-- Calls a function that may meet foreign data before its first write. Returns whether it met none, and its values; any
-- other error is raised again.
function ff.guarded(part, ...)
  local results = { pcall(part, ...) }
  local fault = results[2]
  if not results[1] then
    fault = type(fault) == 'table' and fault.err or tostring(fault)
    if not (string.find(fault, '^CORRUPT ') or string.find(fault, '^WRONGTYPE ')) then
      error({ err = fault })
    end
  end
  return unpack(results, 1, 4)
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

-- A lease as it is stored: whoever reads the execution learns no lease id.
function ff.lease_digest(lease_id)
  return redis.sha1hex(lease_id)
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

-- A list whose size a caller chooses is never unpacked whole: the Lua stack has an end.
local PIECE = 128

-- Some fields of a hash, as a table.
function ff.hash_fields(key, names)
  local fields = {}
  for first = 1, #names, PIECE do
    local values = redis.call('HMGET', key, unpack(names, first, math.min(first + PIECE - 1, #names)))
    for i, value in ipairs(values) do
      fields[names[first + i - 1]] = value or nil
    end
  end
  return fields
end

-- Runs a command that takes any number of values behind its key: HSET with `name value` pairs, RPUSH.
function ff.write_list(command, key, values)
  for first = 1, #values, PIECE do
    redis.call(command, key, unpack(values, first, math.min(first + PIECE - 1, #values)))
  end
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

-- The head of an attempt is one string of what every append reads and changes: when the lease ends in ms, in 13 digits;
-- 1 where a cancel was requested, else 0; the id of the writer, NO_WRITER where none is open; the id of the last frame.
-- To read it and to write an id in its place costs half as much as fields of a hash.
ff.NO_WRITER = '-'

function ff.head_text(head)
  return string.format(
    '%013d %s %s %s', math.min(head.lease_expires_at, ff.MAX_MS), head.cancel_requested, head.writer, head.last_id
  )
end

-- The head that a text is, as a table; nil where it is none.
function ff.parse_head(text)
  local ends, cancel_requested, writer, last_id = string.match(text or '', '^(%d+) ([01]) (%S+) (%d+%-%d+)$')
  if not ends or #ends ~= 13 then
    return nil
  end
  return { lease_expires_at = tonumber(ends), cancel_requested = cancel_requested, writer = writer, last_id = last_id }
end

-- The head of an attempt; nil where there is none.
function ff.read_head(head_key)
  local text = redis.call('GET', head_key)
  return text and (ff.parse_head(text) or ff.corrupt('head'))
end

-- Keeps a TTL: what ends an attempt may take its writer away afterwards.
function ff.write_head(head_key, head)
  redis.call('SET', head_key, ff.head_text(head), 'KEEPTTL')
end

-- The key of the meta hash beside a head.
function ff.meta_beside(head_key)
  return string.sub(head_key, 1, -5) .. 'meta'
end

-- The number of frames in a run, which is a varint at its beginning; 1 where it is no run.
function ff.run_count(run)
  local low, high = string.byte(run, 1, 2)
  if low and low >= 128 and high and high < 128 then
    return low - 128 + 128 * high
  end
  return low and low > 0 and low < 128 and low or 1
end
