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

-- The states of an execution; those with a value are terminal, and the value is the reason that its stream closes with.
ff.TERMINAL = {
  completed = 'attempt_success',
  failed = 'attempt_failure',
  cancelled = 'attempt_cancelled',
  expired = 'expired',
}

-- What every fenced call reads of the core, in this order.
-- Returns the fields, or nil and the error reply.
function ff.read_fence(core_key, attempt_index, lease_id, lease_epoch)
  local core = redis.call(
    'HMGET', core_key, 'state', 'current_attempt_index', 'current_lease_id', 'current_lease_epoch',
    'lease_expires_at', 'cancel_requested'
  )
  if not core[1] then
    return nil, ff.err('execution_not_found')
  end
  if core[2] ~= attempt_index or core[3] ~= lease_id or core[4] ~= lease_epoch then
    return nil, ff.err('stale_owner')
  end
  return core
end

-- The fence of a call that needs a live lease but is not an append.
function ff.read_active(core_key, attempt_index, lease_id, lease_epoch, now)
  local core, refusal = ff.read_fence(core_key, attempt_index, lease_id, lease_epoch)
  if not core then
    return nil, refusal
  end
  if core[1] == 'suspended' then
    return nil, ff.err('suspended')
  end
  if core[1] ~= 'active' then
    return nil, ff.err('execution_not_active', core[1])
  end
  if (tonumber(core[5]) or 0) <= now then
    return nil, ff.err('lease_expired')
  end
  return core
end

-- Ends the stream of an attempt: the canonical word in meta, its echo at the end of the log (which wakes every
-- blocked reader), and the retention of every key of the attempt. An attempt that never wrote a frame ends the
-- same way. The end entry takes the sequence after the last frame.
function ff.end_stream(log, live, meta, summary, now, reason, retention_ms)
  local call = redis.call
  local state = call('HMGET', meta, 'last_sequence', 'last_ms', 'closed_at', 'visible_sequence')
  if state[3] then
    return
  end
  local sequence = (tonumber(state[1]) or 0) + 1
  local ms = math.max(now, tonumber(state[2]) or 0)
  call('HSET', meta, 'closed_at', ff.text(now), 'closed_reason', reason)
  call('XADD', log, string.format('%d-%d', ms, sequence), 'end', reason, 'prev', state[4] or '0')
  call('PEXPIRE', log, retention_ms)
  call('PEXPIRE', live, retention_ms)
  call('PEXPIRE', meta, retention_ms)
  call('PEXPIRE', summary, retention_ms)
end
