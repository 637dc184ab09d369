-- The one table that the parts of the library share.
--
-- Nothing global is touched while the library loads: Valkey 9 hides almost every global at that time, so
-- `redis.call`, `string`, `tonumber` and the rest are named inside functions only.
-- Numbers leave as decimal integers ('%d') and stay at or below 2^53-1, the last integer a Lua number holds exactly.
-- Lua has no rollback: every function reads and checks everything before its first write.

local ff = {}

ff.MAX_INTEGER = 9007199254740991
ff.MAX_PAYLOAD = 65536
-- One call holds the server for its whole length: about 1.5 us a frame, so 1024 frames stay below 2 ms.
ff.MAX_FRAMES = 1024
ff.MAX_RUN_BYTES = 2097152
-- Field lists of one stream entry are unpacked onto the Lua stack; this bounds them far below its limit.
ff.MAX_FIELDS = 32

function ff.ok(...)
  return { 1, 'OK', ... }
end

function ff.err(code, ...)
  return { 0, code, ... }
end

function ff.now_ms()
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end

-- tonumber alone accepts '1e3', '0x10', ' 5 ' and 'inf'.
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

-- How many frames a run holds, which is a varint at its beginning; 1 where it is no run.
function ff.run_count(run)
  local low, high = string.byte(run, 1, 2)
  if low and low >= 128 and high and high < 128 then
    return low - 128 + 128 * high
  end
  return low and low > 0 and low < 128 and low or 1
end
