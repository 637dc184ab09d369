-- Calls that give the lease up. Each remembers its answer under the lease, and answers a repeat with it.

-- The owned execution of such a call; or nil and the reply, which is the answer of the first run where `kind` is what
-- that run was.
local function giving_up(core_key, args, kind)
  local x, refusal, seen = ff.owned(core_key, args)
  if x then
    return x
  end
  local words = seen and ff.remembered(seen, args)
  if words and words[1] == kind then
    return nil, ff.ok(unpack(words))
  end
  return nil, refusal
end
ff.giving_up = giving_up

-- ff_complete_execution
--   keys:    core
--   args:    attempt_index lease_id lease_epoch payload
--   returns: state (lane_id eligible_score)...
--   errors:  execution_not_found stale_owner suspended execution_not_active lease_expired
redis.register_function('ff_complete_execution', function(keys, args)
  local x, reply = giving_up(keys[1], args, 'completed')
  if not x then
    return reply
  end
  ff.remember(x, args, 'completed')
  if #args[4] > 0 then
    redis.call('SET', x.prefix .. 'result', args[4])
  end
  x.result = args[4]
  ff.move(x, 'completed')
  return ff.ok_with_hints(x, 'completed')
end)

-- How long the next retry waits: fixed, or growing by a factor, at most retry_max_delay_ms; less a random share.
local function retry_delay(fields)
  local delay = tonumber(fields.retry_delay_ms)
  if fields.retry_backoff == 'exponential' then
    -- Bounded, as 0 times infinity is no number.
    delay = delay * math.min((tonumber(fields.retry_multiplier_percent) / 100) ^ tonumber(fields.retry_count), 2 ^ 53)
  end
  delay = math.min(delay, tonumber(fields.retry_max_delay_ms))
  return math.floor(delay * (1 - math.random() * tonumber(fields.retry_jitter_percent) / 100))
end

-- Ends the attempt of an active execution as failed. The class decides: permanent and cancelled failures never retry,
-- a crash counts as a lost producer, the others retry while retries are left; then the execution moves to `last`.
-- Returns the words of the answer.
function ff.fail_attempt(x, class, last, reason)
  local fields = x.fields
  if class == 'infra_crash' then
    ff.lapse(x, true)
    if x.state == 'waiting' then
      return 'retry_scheduled', ff.text(x.now)
    end
    return 'terminal_failed', '0'
  end
  local retries = tonumber(fields.retry_count)
  if class ~= 'permanent' and class ~= 'cancelled' and retries < tonumber(fields.retry_max) then
    local due = x.now + retry_delay(fields)
    ff.end_attempt(x, reason)
    ff.set(x, 'retry_count', ff.text(retries + 1))
    ff.move(x, 'delayed', reason)
    ff.set_timer(x, 'delay', due)
    return 'retry_scheduled', ff.text(due)
  end
  ff.move(x, last, reason)
  return 'terminal_failed', '0'
end

-- ff_fail_execution
--   keys:    core
--   args:    attempt_index lease_id lease_epoch message failure_class detail
--   returns: kind outcome delay_until_ms (lane_id eligible_score)...
--   errors:  execution_not_found stale_owner suspended execution_not_active lease_expired
redis.register_function('ff_fail_execution', function(keys, args)
  local x, reply = giving_up(keys[1], args, 'failed')
  if not x then
    return reply
  end
  ff.set(x, 'failure_reason', args[4], 'failure_class', args[5], 'failure_detail', args[6])
  local outcome, due = ff.fail_attempt(x, args[5], 'failed', 'attempt_failure')
  ff.remember(x, args, 'failed', outcome, due)
  return ff.ok_with_hints(x, 'failed', outcome, due)
end)

-- ff_delay_execution
--   keys:    core
--   args:    attempt_index lease_id lease_epoch delay_ms
--   returns: kind delay_until_ms
--   errors:  execution_not_found stale_owner suspended execution_not_active lease_expired invalid_input
--
-- The same attempt, and its stream, go on after the delay.
redis.register_function('ff_delay_execution', function(keys, args)
  local delay_ms = ff.integer(args[4])
  if not delay_ms then
    return ff.err('invalid_input', 'delay_ms')
  end
  local x, reply = giving_up(keys[1], args, 'delayed')
  if not x then
    return reply
  end
  local due = ff.text(x.now + delay_ms)
  ff.interrupt_attempt(x)
  ff.remember(x, args, 'delayed', due)
  ff.move(x, 'delayed')
  ff.set_timer(x, 'delay', due)
  return ff.ok('delayed', due)
end)

-- ff_wait_children
--   keys:    core
--   args:    attempt_index lease_id lease_epoch
--   returns: kind (lane_id eligible_score)...
--   errors:  execution_not_found stale_owner suspended execution_not_active lease_expired
--
-- The same attempt goes on when the last child has ended; at once where none is open.
redis.register_function('ff_wait_children', function(keys, args)
  local x, reply = giving_up(keys[1], args, 'waiting_children')
  if not x then
    return reply
  end
  ff.interrupt_attempt(x)
  ff.remember(x, args, 'waiting_children')
  ff.move(x, 'waiting_children')
  if redis.call('SCARD', x.prefix .. 'children') == 0 then
    ff.move(x, 'waiting')
  end
  return ff.ok_with_hints(x, 'waiting_children')
end)

-- ff_cancel_execution
--   keys:    core
--   args:    reason grace_ms
--   returns: state previous_state (lane_id eligible_score)...
--   errors:  execution_not_found execution_not_active invalid_input
--
-- With a grace an active execution is asked first: its worker hears of it with its next append or renewal, and the
-- cancellation is forced when the grace is over. The status is REQUESTED then. Cancelling a cancelled execution again
-- answers as the first time.
redis.register_function('ff_cancel_execution', function(keys, args)
  local grace_ms = ff.integer(args[2])
  if not grace_ms then
    return ff.err('invalid_input', 'grace_ms')
  end
  local x = ff.load(keys[1])
  if not x then
    return ff.err('execution_not_found')
  end
  if x.state == 'cancelled' then
    return ff.ok('cancelled', x.fields.cancelled_from)
  end
  if ff.OUTCOMES[x.state] then
    return ff.err('execution_not_active', x.state, x.fields.outcome)
  end
  local from = x.state
  if from == 'active' and grace_ms > 0 then
    redis.call('HSET', ff.attempt_keys(x, x.fields.current_attempt_index).meta, 'cancel_requested', '1')
    ff.set(x, 'cancel_requested', '1', 'cancellation_reason', args[1])
    -- Asking again gives no longer grace.
    redis.call('ZADD', x.timers, 'LT', ff.text(x.now + grace_ms), 'cancel:' .. x.id)
    return { 1, 'REQUESTED', from, from }
  end
  ff.set(x, 'cancellation_reason', args[1], 'cancelled_from', from)
  ff.move(x, 'cancelled')
  return ff.ok_with_hints(x, 'cancelled', from)
end)
