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
--   errors:  flow_not_found invalid_input
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
  local open = call('ZCARD', open_key)
  backlog_ms = ff.integer(backlog_ms)
  if not backlog_ms then
    return ff.err('invalid_input', 'backlog_ms')
  end
  if not flow_id then
    ff.corrupt('flow')
  end
  if state == 'open' then
    local now = ff.now_ms()
    ff.expect('timers', timers_key)
    call('HSET', flow_key, 'state', 'cancelled', 'cancel_policy', policy, 'cancel_reason', reason, 'cancelled_at',
      ff.text(now))
    if policy ~= 'flow_only' and open > 0 then
      call('ZADD', timers_key, ff.text(now + backlog_ms), 'flow:' .. flow_id)
    end
  end
  return ff.ok(first_policy or policy, ff.text(open))
end)

-- Cancels one member as the policy says. Returns its hints; nil where it is not cancelled.
local function cancel_member(core_key, open_key, member, policy, reason, now)
  local execution = ff.load(core_key, now)
  if not execution or ff.OUTCOMES[execution.state] then
    redis.call('ZREM', open_key, member)
    return nil
  end
  if ff.flow_verdict(policy, execution.fields.interrupted, execution.state) ~= 'cancel' then
    return nil
  end
  ff.check_move(execution)
  ff.set(execution, 'cancellation_reason', reason, 'cancelled_from', execution.state)
  ff.move(execution, 'cancelled')
  return execution.hints
end

-- ff_cancel_members
--   keys:    flow open timers
--   args:    count
--   returns: cancelled left (lane_id required_capabilities eligible_score)...
--   errors:  invalid_input
--
-- Cancels up to `count` open members of a cancelled flow, as its policy says. `left` is 1 where more are to be
-- cancelled, else 0. Members that the policy lets run are not counted. A flow that is gone has no members.
--
-- The flow keeps the place of one walk through its open members, so the calls of all who cancel them look at each
-- member once: a flow that is cancelled gets no further ones, and a member that runs is cancelled where it would wait
-- again. The place is a member, in the order of their ids: a cursor of SSCAN is of one process, and after a restart or
-- a failover it would pass over others. A member with foreign data in its keys stays as it is.
redis.register_function('ff_cancel_members', function(keys, args)
  local call = redis.call
  local flow_key, open_key, timers_key = unpack(keys, 1, 3)
  local count = args[1]
  local limit = ff.integer(count)
  if not limit or limit < 1 then
    return ff.err('invalid_input', 'count')
  end
  local flow_state, policy, reason, last = unpack(
    call('HMGET', flow_key, 'state', 'cancel_policy', 'cancel_reason', 'last_looked_at')
  )
  local slot_tag, flow_id = string.match(flow_key, '^ff:flow:(%b{}):(.*)$')
  local cancelled, left, hints = 0, 0, {}
  ff.expect('timers', timers_key)
  if flow_state == 'cancelled' and policy ~= 'flow_only' then
    local now = ff.now_ms()
    local page = call('ZRANGEBYLEX', open_key, last and '(' .. last or '-', '+', 'LIMIT', 0, limit)
    for _, member in ipairs(page) do
      local core_key = ff.key('core', slot_tag, member)
      local intact, told = ff.guarded(cancel_member, core_key, open_key, member, policy, reason, now)
      if intact and told then
        cancelled = cancelled + 1
        ff.with_hints(hints, told)
      end
    end
    if #page == limit then
      left = 1
      call('HSET', flow_key, 'last_looked_at', page[limit])
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
--   returns: state member_count open_count
--   errors:  flow_not_found
--
-- The members themselves are read in pages.
redis.register_function({
  function_name = 'ff_describe_flow',
  callback = function(keys)
    local call = redis.call
    local flow_key, members_key, open_key = unpack(keys, 1, 3)
    local state = call('HGET', flow_key, 'state')
    if not state then
      return ff.err('flow_not_found')
    end
    return ff.ok(state, ff.text(call('SCARD', members_key)), ff.text(call('ZCARD', open_key)))
  end,
  flags = { 'no-writes' },
})
