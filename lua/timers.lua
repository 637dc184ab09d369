-- Timers: one set per partition, member `<kind>:<execution id>[:<more>]`, score the time at which it is due. A
-- supervisor reads the due timers and fires each by a call that checks again, so any number of supervisors may run. A
-- timer with nothing to do is removed, and an early one is moved: none stays due.

-- Whether the filter of a supervisor lets the execution pass.
local function wanted(execution, namespace, tag_name, tag_value)
  if namespace ~= '' and execution.fields.namespace ~= namespace then
    return false
  end
  return tag_name == '' or redis.call('HGET', ff.execution_key(execution, 'tags'), tag_name) == tag_value
end

local FIRE = {}

function FIRE.lease(execution)
  if execution.state ~= 'active' then
    return 'done'
  end
  local expires_at = ff.lease_expires_at(execution)
  if expires_at > execution.now then
    return 'later', expires_at
  end
  ff.lapse(execution)
  return 'done'
end

function FIRE.delay(execution)
  if execution.state == 'delayed' then
    ff.move(execution, 'waiting')
  end
  return 'done'
end

function FIRE.attempt(execution)
  if execution.state == 'active' then
    ff.set(execution, 'failure_reason', 'attempt_timeout', 'failure_class', 'timeout')
    ff.fail_attempt(execution, 'timeout', 'expired', 'attempt_timeout')
  end
  return 'done'
end

function FIRE.deadline(execution)
  if not ff.OUTCOMES[execution.state] then
    ff.set(execution, 'failure_reason', 'execution_deadline')
    ff.move(execution, 'expired')
  end
  return 'done'
end

function FIRE.suspension(execution)
  if execution.state == 'suspended' then
    ff.expire_suspension(execution)
  end
  return 'done'
end

function FIRE.cancel(execution)
  -- After the grace an execution is cancelled in any state.
  if not ff.OUTCOMES[execution.state] then
    ff.set(execution, 'cancelled_from', execution.state)
    ff.move(execution, 'cancelled')
  end
  return 'done'
end

function FIRE.waitpoint(execution, waitpoint_id)
  if redis.call('HGET', ff.waitpoint_key(execution, waitpoint_id), 'state') == 'pending' then
    ff.close_waitpoint(execution, waitpoint_id, 'never_committed')
  end
  return 'done'
end

-- ff_fire_timer
--   keys:    timers core
--   args:    member kind more namespace tag_name tag_value
--   returns: what (lane_id required_capabilities eligible_score)...
--   errors:
--
-- what: `done`, `later`, or `skipped` where the filter leaves the execution to another supervisor.
redis.register_function('ff_fire_timer', function(keys, args)
  local call = redis.call
  local timers_key, core_key = unpack(keys, 1, 2)
  local member, kind, more, namespace, tag_name, tag_value = unpack(args, 1, 6)
  local due = call('ZSCORE', timers_key, member)
  if not due then
    return ff.ok('done')
  end
  local execution = ff.load(core_key)
  if not execution or not FIRE[kind] then
    call('ZREM', timers_key, member)
    return ff.ok('done')
  end
  if tonumber(due) > execution.now then
    return ff.ok('later')
  end
  if not wanted(execution, namespace, tag_name, tag_value) then
    return ff.ok('skipped')
  end
  local what, later = FIRE[kind](execution, more)
  if what == 'later' then
    call('ZADD', timers_key, ff.text(later), member)
  else
    call('ZREM', timers_key, member)
  end
  return ff.with_hints(ff.ok(what), execution.hints)
end)
