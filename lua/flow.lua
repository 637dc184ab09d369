-- Flows: executions that share a partition and can be cancelled together.

-- ff_create_flow
--   keys:    flow
--   args:    flow_id namespace
--   returns: state
--   errors:
--
-- The status is DUPLICATE where the flow exists.
redis.register_function('ff_create_flow', function(keys, args)
  local flow_key = keys[1]
  local flow_id, namespace = unpack(args, 1, 2)
  local state = redis.call('HGET', flow_key, 'state')
  if state then
    return ff.reply('DUPLICATE', state)
  end
  redis.call('HSET', flow_key, 'flow_id', flow_id, 'namespace', namespace, 'state', 'open', 'created_at',
    ff.text(ff.now_ms()))
  ff.expire_flow_later(ff.slot_tag_of(flow_key), flow_id)
  return ff.ok('open')
end)

-- ff_cancel_flow
--   keys:    flow members open timers
--   args:    reason policy backlog_ms
--   returns: policy open_members
--   errors:  flow_not_found
--
-- No member is claimed afterwards. The members themselves are cancelled in pages, by the caller or, from backlog_ms on,
-- by a supervisor. Cancelling again answers the policy of the first time.
redis.register_function('ff_cancel_flow', function(keys, args)
  local call = redis.call
  local flow_key, _, open_key, timers_key = unpack(keys, 1, 4)
  local reason, policy, backlog_ms = unpack(args, 1, 3)
  local state, first_policy, flow_id = unpack(call('HMGET', flow_key, 'state', 'cancel_policy', 'flow_id'))
  if not state then
    return ff.err('flow_not_found')
  end
  if state == 'open' then
    local now = ff.now_ms()
    call('HSET', flow_key, 'state', 'cancelled', 'cancel_policy', policy, 'cancel_reason', reason, 'cancelled_at',
      ff.text(now))
    if policy ~= 'flow_only' and call('SCARD', open_key) > 0 then
      call('ZADD', timers_key, ff.text(now + backlog_ms), 'flow:' .. flow_id)
    end
  end
  return ff.ok(first_policy or policy, ff.text(call('SCARD', open_key)))
end)

-- ff_cancel_members
--   keys:    flow open timers
--   args:    count
--   returns: cancelled left (lane_id required_capabilities eligible_score)...
--   errors:
--
-- Cancels up to `count` open members of a cancelled flow, as its policy says. `left` is 1 where more are to be
-- cancelled, else 0. Members that the policy lets run are not counted. A flow that is gone has no members.
redis.register_function('ff_cancel_members', function(keys, args)
  local call = redis.call
  local flow_key, open_key, timers_key = unpack(keys, 1, 3)
  local count = args[1]
  local flow_state, policy, reason = unpack(call('HMGET', flow_key, 'state', 'cancel_policy', 'cancel_reason'))
  local slot_tag, flow_id = string.match(flow_key, '^ff:flow:(%b{}):(.*)$')
  local limit, cancelled, left, hints = tonumber(count), 0, 0, {}
  if flow_state == 'cancelled' and policy ~= 'flow_only' then
    local now = ff.now_ms()
    for _, member in ipairs(call('SMEMBERS', open_key)) do
      local core_key = ff.key('core', slot_tag, member)
      local state, interrupted = unpack(call('HMGET', core_key, 'state', 'interrupted'))
      if not state or ff.OUTCOMES[state] then
        call('SREM', open_key, member)
      elseif ff.flow_verdict(policy, interrupted, state) == 'cancel' then
        if cancelled == limit then
          left = 1
          break
        end
        local execution = ff.load(core_key, now)
        ff.set(execution, 'cancellation_reason', reason, 'cancelled_from', state)
        ff.move(execution, 'cancelled')
        cancelled = cancelled + 1
        ff.with_hints(hints, execution.hints)
      end
    end
  end
  if left == 0 then
    call('ZREM', timers_key, 'flow:' .. flow_id)
  end
  return ff.with_hints(ff.ok(ff.text(cancelled), ff.text(left)), hints)
end)

-- ff_describe_flow
--   keys:    flow members open
--   args:
--   returns: flow members open
--   errors:  flow_not_found
redis.register_function({
  function_name = 'ff_describe_flow',
  callback = function(keys)
    local call = redis.call
    local flow_key, members_key, open_key = unpack(keys, 1, 3)
    local flow = call('HGETALL', flow_key)
    if #flow == 0 then
      return ff.err('flow_not_found')
    end
    return ff.ok(flow, call('SMEMBERS', members_key), call('SMEMBERS', open_key))
  end,
  flags = { 'no-writes' },
})
