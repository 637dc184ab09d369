-- Executions: their one state, the one place that changes it, creation and description.

-- From a state to the states that may follow it.
ff.TRANSITIONS = {
  waiting = { active = true },
  active = { completed = true, failed = true },
}

-- Eligible executions sort by priority (higher first), then by age. Exact: |score| < 2^53 up to priority 9000.
function ff.eligible_score(priority, created_ms)
  return ff.text(created_ms - priority * 1000000000000)
end

-- Moves an execution to another state: the state, its times and the index that its states name, together.
-- Every caller has checked its arguments before; a transition that the table does not know is a bug of the caller.
function ff.move(core_key, eligible, execution_id, from, to, now)
  if not (ff.TRANSITIONS[from] and ff.TRANSITIONS[from][to]) then
    error('ff_fast: no transition from ' .. from .. ' to ' .. to)
  end
  local text = ff.text(now)
  redis.call('HSET', core_key, 'state', to, 'last_transition_at', text)
  if from == 'waiting' then
    redis.call('ZREM', eligible, execution_id)
  end
  if ff.TERMINAL[to] then
    redis.call('HSET', core_key, 'completed_at', text)
  end
end

-- ff_create_execution
--   keys:    core payload tags eligible
--   args:    execution_id namespace lane_id priority required_capabilities retention_ms payload (tag value)...
--   returns: eligible_score
--   errors:  invalid_input
--
-- The status is DUPLICATE, and nothing is changed, where the execution exists: a caller that lost the reply asks again.
redis.register_function('ff_create_execution', function(keys, args)
  local call = redis.call
  local priority, retention_ms = ff.integer(args[4]), ff.integer(args[6])
  if not priority or priority > 9000 then
    return ff.err('invalid_input', 'priority')
  end
  if not retention_ms or retention_ms < 1 then
    return ff.err('invalid_input', 'retention_ms')
  end
  if (#args - 7) % 2 ~= 0 then
    return ff.err('invalid_input', 'tags')
  end
  local existing = call('HMGET', keys[1], 'state', 'priority', 'created_at')
  if existing[1] then
    return { 1, 'DUPLICATE', ff.eligible_score(tonumber(existing[2]), tonumber(existing[3])) }
  end
  local now = ff.now_ms()
  local score = ff.eligible_score(priority, now)
  call(
    'HSET', keys[1], 'execution_id', args[1], 'namespace', args[2], 'lane_id', args[3], 'priority', args[4],
    'required_capabilities', args[5], 'retention_ms', args[6], 'state', 'waiting', 'created_at', ff.text(now),
    'last_transition_at', ff.text(now), 'total_attempt_count', '0', 'current_lease_epoch', '0'
  )
  if #args[7] > 0 then
    call('SET', keys[2], args[7])
  end
  for i = 8, #args, 2 do
    call('HSET', keys[3], args[i], args[i + 1])
  end
  call('ZADD', keys[4], score, args[1])
  return ff.ok(score)
end)

-- ff_describe_execution
--   keys:    core
--   args:
--   returns: (field value)...
--   errors:  execution_not_found
redis.register_function({
  function_name = 'ff_describe_execution',
  callback = function(keys)
    local fields = redis.call('HGETALL', keys[1])
    if #fields == 0 then
      return ff.err('execution_not_found')
    end
    return ff.ok(unpack(fields))
  end,
  flags = { 'no-writes' },
})

-- ff_read_payload
--   keys:    core payload
--   args:
--   returns: payload
--   errors:  execution_not_found
redis.register_function({
  function_name = 'ff_read_payload',
  callback = function(keys)
    if redis.call('EXISTS', keys[1]) == 0 then
      return ff.err('execution_not_found')
    end
    return ff.ok(redis.call('GET', keys[2]) or '')
  end,
  flags = { 'no-writes' },
})
