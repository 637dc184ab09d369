-- Named streams: whoever opens one produces it, or learns that somebody else does.
--
-- The execution of a named stream has the lane ''. It stands in no index, so no claim finds it. It is created under its
-- first lease, and while it is active the timer `lease` is that of its lease, as of any execution. While it waits for a
-- producer, after a lapse or where one has given it back, the same timer ends it: see ff.enqueue and the timers.

-- Attempts whose keys one call removes, at some 10 us each.
local ATTEMPTS_A_CALL = 128
local MOST_RECLAIMS = '4294967295'

-- The execution that a name is to stand for, before anything is stored.
local function unborn(core_key, now, execution_id, namespace, retention_ms, takeover_ms)
  local execution = ff.execution_of(core_key, {
    execution_id = execution_id, namespace = namespace, lane_id = '', priority = '0', required_capabilities = '',
    retention_ms = retention_ms, takeover_ms = takeover_ms, created_at = ff.text(now), total_attempt_count = '0',
    current_lease_epoch = '0', retry_count = '0', reclaim_count = '0', retry_max = '0', retry_backoff = 'fixed',
    retry_delay_ms = '0', retry_multiplier_percent = '100', retry_max_delay_ms = '0', retry_jitter_percent = '0',
    max_reclaims = MOST_RECLAIMS, attempt_timeout_ms = '0',
  }, now)
  execution.state = 'waiting'
  return execution
end

-- Stores an unborn execution, but for its state: its first lease gives it that.
local function store(execution, payload_key, payload, tags_key, args, first)
  local flat = {}
  for name, value in pairs(execution.fields) do
    flat[#flat + 1], flat[#flat + 2] = name, value
  end
  redis.call('HSET', execution.core_key, unpack(flat))
  if #payload > 0 then
    redis.call('SET', payload_key, payload)
  end
  for i = first, #args, 2 do
    redis.call('HSET', tags_key, args[i], args[i + 1])
  end
end

-- ff_open_stream
--   keys:    core payload tags
--   args:    execution_id namespace retention_ms takeover_ms worker_id worker_instance_id lease_id lease_ttl_ms
--            attempt_id writer_text payload_limit payload (tag value)...
--   returns: execution_id attempt_index attempt_id lease_epoch expires_at_ms kind last_id visible_sequence estimator
--            summary_version opening
--   errors:  invalid_input
--
-- Creates the execution where there is none, puts it under a lease, and opens the writer `<attempt index>:<lease
-- digest>:<lease epoch>:<writer_text>` of its attempt. A lapsed lease is taken over: its attempt ends as producer_lost,
-- and a new one begins. A call whose lease is held changes nothing and gets the same answer, so it may be repeated.
-- Status CONSUMER, with the state as the only value: somebody else holds the lease, or has released it until something
-- happens, or the execution has ended, or waits for the workers of a lane.
redis.register_function('ff_open_stream', function(keys, args)
  local call = redis.call
  local core_key, payload_key, tags_key = unpack(keys, 1, 3)
  local execution_id, namespace, retention_ms, takeover_ms, worker_id, worker_instance_id, lease_id, lease_ttl_ms,
    attempt_id, writer_text, payload_limit, payload = unpack(args, 1, 12)
  if
    (ff.integer(retention_ms) or 0) < 1 or (ff.integer(takeover_ms) or 0) < 1 or (ff.integer(lease_ttl_ms) or 0) < 1
    or not payload or (#args - 12) % 2 ~= 0 or (#args - 12) / 2 > ff.MAX_TAGS
  then
    return ff.err('invalid_input', 'argument')
  end
  local execution = ff.load(core_key)
  local exists = execution ~= nil
  execution = execution
    or unborn(core_key, ff.now_ms(), execution_id, namespace, retention_ms, takeover_ms)
  local fields, state, lease_digest = execution.fields, execution.state, ff.lease_digest(lease_id)
  local granted
  if state == 'active' and ff.is_named(execution) then
    granted = ff.granted_before(execution)
    if granted and fields.current_lease_digest ~= lease_digest then
      return ff.reply('CONSUMER', state)
    end
  elseif state ~= 'waiting' or not ff.is_named(execution) then
    return ff.reply('CONSUMER', state)
  end
  local take_over = state == 'active' and not granted
  local index = granted and granted[2]
  if not granted then
    ff.check_claim(execution, nil, take_over)
    index = not take_over and fields.interrupted == '1' and fields.current_attempt_index or fields.total_attempt_count
  end
  local head_key = ff.attempt_key(execution, 'head', index)
  local before = ff.written_before(head_key, ff.attempt_key(execution, 'summary', index))
  if not exists and #args > 12 then
    ff.expect('tags', tags_key)
  end
  call('SPUBLISH', head_key, ff.PUSH.CHANGED)
  if not exists then
    store(execution, payload_key, payload, tags_key, args, 13)
  elseif take_over then
    ff.lapse(execution)
  end
  granted = granted
    or ff.grant_lease(execution, worker_id, worker_instance_id, lease_id, lease_ttl_ms, attempt_id)
  local writer = table.concat({ index, lease_digest, granted[4], writer_text }, ':')
  for _, value in ipairs({ ff.open_writer(execution.heads[index], head_key, before, writer, payload_limit) }) do
    granted[#granted + 1] = value
  end
  return ff.ok(unpack(granted))
end)

-- ff_delete_execution
--   keys:    core
--   args:    reason
--   returns: (lane_id required_capabilities eligible_score)...
--   errors:  execution_not_found
--
-- Removes an execution with all its keys, or a part of them: with status MORE the call is made again. One that has not
-- ended is cancelled, with status CANCELLED, and keeps its keys until the next call, so that its readers learn the end.
redis.register_function('ff_delete_execution', function(keys, args)
  local core_key = keys[1]
  local reason = args[1]
  local execution = ff.load(core_key)
  if not execution then
    return ff.err('execution_not_found')
  end
  if not ff.OUTCOMES[execution.state] then
    ff.check_move(execution)
    ff.set(execution, 'cancellation_reason', reason, 'cancelled_from', execution.state)
    ff.move(execution, 'cancelled')
    return ff.with_hints(ff.reply('CANCELLED'), execution.hints)
  end
  local fields = execution.fields
  -- The end of an execution may have ended the stream of an attempt that never began.
  local last = ff.core_number(execution, 'total_attempt_count')
  local first = fields.removed_attempts and ff.core_number(execution, 'removed_attempts') or 0
  ff.expect('timers', execution.timers_key)
  if fields.flow_id then
    ff.expect('flow_members', ff.key('flow_members', execution.slot_tag, fields.flow_id))
  end
  local removed = math.min(first + ATTEMPTS_A_CALL, last + 1)
  ff.remove_attempts(execution, first, removed - 1)
  if removed <= last then
    ff.set(execution, 'removed_attempts', ff.text(removed))
    return ff.reply('MORE')
  end
  ff.remove_execution(execution)
  return ff.ok()
end)
