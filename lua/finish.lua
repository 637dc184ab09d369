-- Calls that release the lease. Each saves its answer under the lease, and answers a repeat with it.
--
-- They carry `last_id`: the last frame that the caller knows to be stored, '' for none. A stream that has lost it, as
-- after a failover, is refused with sequence_gap.

-- ff_complete_execution
--   keys:    core
--   args:    attempt_index lease_id lease_epoch last_id payload
--   returns: state (lane_id required_capabilities eligible_score)...
--   errors:  execution_not_found stale_owner state_lost suspended execution_not_active lease_expired sequence_gap
--            invalid_input
redis.register_function('ff_complete_execution', function(keys, args)
  local core_key = keys[1]
  local attempt_index, lease_id, lease_epoch, last_id, payload = unpack(args, 1, 5)
  local execution, reply = ff.load_releasable(core_key, attempt_index, lease_id, lease_epoch, 'completed', last_id)
  if not execution then
    return reply
  end
  if #payload > 0 then
    redis.call('SET', ff.execution_key(execution, 'result'), payload)
  end
  execution.result = payload
  ff.move(execution, 'completed', nil, ff.reply_fields(execution, 'completed'))
  return ff.with_hints(ff.ok('completed'), execution.hints)
end)

-- How long the next retry waits: fixed, or growing by a factor, at most retry_max_delay_ms; less a random share.
local function retry_delay(execution)
  local number = ff.core_number
  local delay = number(execution, 'retry_delay_ms')
  if execution.fields.retry_backoff == 'exponential' then
    local factor = number(execution, 'retry_multiplier_percent') / 100
    -- The growth is bounded: 0 times infinity would be NaN.
    delay = delay * math.min(factor ^ number(execution, 'retry_count'), 2 ^ 53)
  end
  delay = math.min(delay, number(execution, 'retry_max_delay_ms'))
  -- By the id: `math.random` begins alike on every server, so the nodes of a cluster would choose the same shares.
  local share = tonumber(redis.sha1hex(execution.id .. ':' .. number(execution, 'retry_count')):sub(1, 8), 16) / 2 ^ 32
  return math.floor(delay * (1 - share * number(execution, 'retry_jitter_percent') / 100))
end

-- Ends the attempt of an active execution as failed. The class decides: permanent and cancelled failures never retry,
-- a crash counts as a lost producer, the others retry while retries are left; else the execution moves to `last`.
-- `message` and `detail` say why; `detail` may be nil. Returns the words of the answer.
function ff.fail_attempt(execution, class, last, reason, message, detail)
  if class == 'infra_crash' then
    ff.lapse(execution, message, detail)
    if execution.state == 'waiting' then
      return 'retry_scheduled', ff.text(execution.now)
    end
    return 'terminal_failed', '0'
  end
  local retries, most = ff.core_number(execution, 'retry_count'), ff.core_number(execution, 'retry_max')
  if class ~= 'permanent' and class ~= 'cancelled' and retries < most then
    local due = execution.now + retry_delay(execution)
    ff.set_failure(execution, message, class, detail, 'retry_count', ff.text(retries + 1))
    ff.end_attempt(execution, reason)
    ff.move(execution, 'delayed', reason)
    ff.set_timer(execution, 'delay', due)
    return 'retry_scheduled', ff.text(due)
  end
  ff.set_failure(execution, message, class, detail)
  ff.move(execution, last, reason)
  return 'terminal_failed', '0'
end

-- ff_fail_execution
--   keys:    core
--   args:    attempt_index lease_id lease_epoch last_id message failure_class detail
--   returns: kind outcome delay_until_ms (lane_id required_capabilities eligible_score)...
--   errors:  execution_not_found stale_owner state_lost suspended execution_not_active lease_expired sequence_gap
--            invalid_input
redis.register_function('ff_fail_execution', function(keys, args)
  local core_key = keys[1]
  local attempt_index, lease_id, lease_epoch, last_id, message, failure_class, detail = unpack(args, 1, 7)
  local execution, reply = ff.load_releasable(core_key, attempt_index, lease_id, lease_epoch, 'failed', last_id)
  if not execution then
    return reply
  end
  local outcome, due = ff.fail_attempt(execution, failure_class, 'failed', 'attempt_failure', message, detail)
  ff.save_reply(execution, 'failed', outcome, due)
  return ff.with_hints(ff.ok('failed', outcome, due), execution.hints)
end)

-- ff_delay_execution
--   keys:    core
--   args:    attempt_index lease_id lease_epoch last_id delay_ms
--   returns: kind delay_until_ms
--   errors:  execution_not_found stale_owner state_lost suspended execution_not_active lease_expired sequence_gap
--            invalid_input
--
-- The same attempt, with its stream, continues after the delay.
redis.register_function('ff_delay_execution', function(keys, args)
  local core_key = keys[1]
  local attempt_index, lease_id, lease_epoch, last_id, delay_ms = unpack(args, 1, 5)
  delay_ms = ff.integer(delay_ms)
  if not delay_ms then
    return ff.err('invalid_input', 'delay_ms')
  end
  local execution, reply = ff.load_releasable(core_key, attempt_index, lease_id, lease_epoch, 'delayed', last_id)
  if not execution then
    return reply
  end
  local due = ff.text(execution.now + delay_ms)
  ff.interrupt_attempt(execution)
  ff.save_reply(execution, 'delayed', due)
  ff.move(execution, 'delayed')
  ff.set_timer(execution, 'delay', due)
  return ff.ok('delayed', due)
end)

-- ff_wait_children
--   keys:    core
--   args:    attempt_index lease_id lease_epoch last_id
--   returns: kind (lane_id required_capabilities eligible_score)...
--   errors:  execution_not_found stale_owner state_lost suspended execution_not_active lease_expired sequence_gap
--            invalid_input
--
-- The same attempt continues when the last child has ended; at once if none is open.
redis.register_function('ff_wait_children', function(keys, args)
  local core_key = keys[1]
  local attempt_index, lease_id, lease_epoch, last_id = unpack(args, 1, 4)
  local execution, reply = ff.load_releasable(
    core_key, attempt_index, lease_id, lease_epoch, 'waiting_children', last_id
  )
  if not execution then
    return reply
  end
  local children = redis.call('SCARD', ff.execution_key(execution, 'children'))
  ff.interrupt_attempt(execution)
  ff.save_reply(execution, 'waiting_children')
  ff.move(execution, 'waiting_children')
  if children == 0 then
    ff.move(execution, 'waiting')
  end
  return ff.with_hints(ff.ok('waiting_children'), execution.hints)
end)

-- ff_cancel_execution
--   keys:    core
--   args:    reason grace_ms lease_id
--   returns: state previous_state (lane_id required_capabilities eligible_score)...
--   errors:  execution_not_found execution_not_active invalid_input
--
-- With a grace, the status for an active execution is REQUESTED: a push, and the answer to the next append or renewal,
-- notify its worker, and a timer forces the cancellation after the grace. Cancelling a cancelled execution again gives
-- the first answer. A worker that ends its own attempt names its lease, and is not told of it; all others pass ''.
redis.register_function('ff_cancel_execution', function(keys, args)
  local core_key = keys[1]
  local reason, grace_ms, lease_id = unpack(args, 1, 3)
  grace_ms = ff.integer(grace_ms)
  if not grace_ms then
    return ff.err('invalid_input', 'grace_ms')
  end
  local execution = ff.load(core_key)
  if not execution then
    return ff.err('execution_not_found')
  end
  local from, fields = execution.state, execution.fields
  if from == 'cancelled' then
    return ff.ok('cancelled', fields.cancelled_from)
  end
  if ff.OUTCOMES[from] then
    return ff.err('execution_not_active', from, fields.outcome)
  end
  ff.check_move(execution)
  execution.by_holder = ff.lease_digest(lease_id) == fields.current_lease_digest
  if from == 'active' and grace_ms > 0 then
    local head_key = ff.attempt_key(execution, 'head', fields.current_attempt_index)
    local head = ff.parse_head(redis.call('GET', head_key))
    if head then
      head.cancel_requested = '1'
      ff.write_head(head_key, head)
    end
    ff.set(execution, 'cancel_requested', '1', 'cancellation_reason', reason)
    -- A second request does not extend the grace.
    redis.call('ZADD', execution.timers_key, 'LT', ff.text(execution.now + grace_ms), 'cancel:' .. execution.id)
    ff.tell_holder(execution, 'cancel')
    return ff.reply('REQUESTED', from, from)
  end
  ff.set(execution, 'cancellation_reason', reason, 'cancelled_from', from)
  ff.move(execution, 'cancelled')
  return ff.with_hints(ff.ok('cancelled', from), execution.hints)
end)
