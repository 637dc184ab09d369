-- Flows: executions that share a partition and can be cancelled together.

-- ff_create_flow
--   keys:    flow
--   args:    flow_id namespace
--   returns: state
--   errors:
--
-- The status is DUPLICATE where the flow exists.
redis.register_function('ff_create_flow', function(keys, args)
  local state = redis.call('HGET', keys[1], 'state')
  if state then
    return { 1, 'DUPLICATE', state }
  end
  redis.call('HSET', keys[1], 'flow_id', args[1], 'namespace', args[2], 'state', 'open', 'created_at',
    ff.text(ff.now_ms()))
  ff.let_flow_go(keys[1])
  return ff.ok('open')
end)

-- ff_cancel_flow
--   keys:    flow members open timers
--   args:    reason policy backlog_ms
--   returns: policy open_members
--   errors:  flow_not_found
--
-- From here on no member is claimed. The members themselves are cancelled one by one, by the caller or, from
-- backlog_ms on, by a supervisor. Cancelling again answers the policy of the first time.
redis.register_function('ff_cancel_flow', function(keys, args)
  local call = redis.call
  local flow = call('HMGET', keys[1], 'state', 'cancel_policy', 'flow_id')
  if not flow[1] then
    return ff.err('flow_not_found')
  end
  if flow[1] == 'open' then
    local now = ff.now_ms()
    call('HSET', keys[1], 'state', 'cancelled', 'cancel_policy', args[2], 'cancel_reason', args[1], 'cancelled_at',
      ff.text(now))
    if args[2] ~= 'flow_only' and call('SCARD', keys[3]) > 0 then
      call('ZADD', keys[4], ff.text(now + args[3]), 'flow:' .. flow[3])
    end
  end
  return ff.ok(call('HGET', keys[1], 'cancel_policy'), ff.text(call('SCARD', keys[3])))
end)

-- ff_cancel_members
--   keys:    flow open timers
--   args:    count
--   returns: cancelled left (lane_id eligible_score)...
--   errors:
--
-- Cancels up to `count` open members of a cancelled flow, as its policy says; `left` is 1 where there are more to be
-- cancelled, else 0. Members that the policy lets run are not counted. A flow that is gone has none.
redis.register_function('ff_cancel_members', function(keys, args)
  local call = redis.call
  local flow = call('HMGET', keys[1], 'state', 'cancel_policy', 'cancel_reason')
  local tag, flow_id = string.match(keys[1], '^ff:flow:(%b{}):(.*)$')
  local limit, cancelled, left, hints = tonumber(args[1]), 0, 0, {}
  if flow[1] == 'cancelled' and flow[2] ~= 'flow_only' then
    local now = ff.now_ms()
    for _, member in ipairs(call('SMEMBERS', keys[2])) do
      local core_key = 'ff:exec:' .. tag .. ':' .. member .. ':core'
      local state = call('HGET', core_key, 'state')
      if not state or ff.OUTCOMES[state] then
        call('SREM', keys[2], member)
      elseif flow[2] == 'cancel_all' or (state ~= 'active' and state ~= 'suspended') then
        if cancelled < limit then
          local x = ff.load(core_key, now)
          ff.set(x, 'cancellation_reason', flow[3], 'cancelled_from', state)
          ff.move(x, 'cancelled')
          cancelled = cancelled + 1
          for _, hint in ipairs(x.hints) do
            hints[#hints + 1] = hint
          end
        else
          left = 1
          break
        end
      end
    end
  end
  if left == 0 then
    call('ZREM', keys[3], 'flow:' .. flow_id)
  end
  return ff.ok(ff.text(cancelled), ff.text(left), unpack(hints))
end)

-- ff_describe_flow
--   keys:    flow members open
--   args:
--   returns: flow members open
--   errors:  flow_not_found
redis.register_function({
  function_name = 'ff_describe_flow',
  callback = function(keys)
    local flow = redis.call('HGETALL', keys[1])
    if #flow == 0 then
      return ff.err('flow_not_found')
    end
    return ff.ok(flow, redis.call('SMEMBERS', keys[2]), redis.call('SMEMBERS', keys[3]))
  end,
  flags = { 'no-writes' },
})
