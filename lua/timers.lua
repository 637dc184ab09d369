-- Timers: one set per partition, member `<kind>:<execution id>` or `flow:<flow id>`, score the time at which it is due.
-- A supervisor reads the due timers and fires each by a call that checks again, so any number of supervisors may run. A
-- timer with nothing to do is removed, and an early one is moved: none stays due.

-- Whether the filter of a supervisor lets the execution pass.
local function wanted(execution, namespace, tag_name, tag_value)
  if namespace ~= '' and execution.fields.namespace ~= namespace then
    return false
  end
  return tag_name == '' or redis.call('HGET', ff.execution_key(execution, 'tags'), tag_name) == tag_value
end

local FIRE = {}
ff.TIMERS = FIRE

function FIRE.lease(execution)
  if execution.state == 'waiting' and ff.is_named(execution) then
    -- Nobody has taken the stream over in time. Of one that never had a producer there is nothing to be kept.
    if execution.fields.total_attempt_count == '0' then
      ff.set(execution, 'retention_ms', execution.fields.takeover_ms)
    end
    ff.set(execution, 'failure_reason', 'producer_lost', 'failure_class', 'infra_crash')
    ff.move(execution, 'failed', 'producer_lost')
    return 'done'
  end
  if execution.state ~= 'active' then
    return 'done'
  end
  local expires_at = ff.lease_expires_at(execution)
  if expires_at > execution.now then
    return 'later', expires_at
  end
  ff.lapse(execution)
  if execution.state == 'waiting' and ff.is_named(execution) then
    return 'later', ff.takeover_until(execution)
  end
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
    ff.fail_attempt(execution, 'timeout', 'expired', 'attempt_timeout', 'attempt_timeout')
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

function FIRE.eligible(execution)
  -- A claim has met foreign data in its keys, and may meet it again.
  if execution.state == 'waiting' then
    ff.enqueue(execution)
  end
  return 'done'
end

-- Fires a timer of an execution, or raises an error before the first write. Returns what was done, the next due time of
-- a timer that stays, and the execution.
local function fire(core_key, kind, due, namespace, tag_name, tag_value)
  local execution = ff.load(core_key)
  if not execution or not FIRE[kind] then
    return 'done'
  end
  if due > execution.now then
    return 'later', due
  end
  if not wanted(execution, namespace, tag_name, tag_value) then
    return 'skipped'
  end
  ff.check_move(execution)
  local what, later = FIRE[kind](execution)
  return what, later, execution
end

-- ff_fire_timer
--   keys:    timers core
--   args:    member kind namespace tag_name tag_value
--   returns: what (lane_id required_capabilities eligible_score)...
--   errors:
--
-- what: `done`, `later`, `skipped` where the filter leaves the execution to another supervisor, or `deferred` where
-- foreign data in the execution's keys keeps the timer from being fired: nothing was done, and the timer is due again
-- in a minute.
redis.register_function('ff_fire_timer', function(keys, args)
  local call = redis.call
  local timers_key, core_key = unpack(keys, 1, 2)
  local member, kind, namespace, tag_name, tag_value = unpack(args, 1, 5)
  local due = call('ZSCORE', timers_key, member)
  if not due then
    return ff.ok('done')
  end
  local intact, what, later, execution = ff.guarded(
    fire, core_key, kind, tonumber(due), namespace, tag_name, tag_value
  )
  if not intact then
    what, later, execution = 'deferred', ff.now_ms() + ff.DEFER_MS, nil
  end
  if what == 'done' then
    call('ZREM', timers_key, member)
  elseif later and later ~= tonumber(due) then
    call('ZADD', timers_key, ff.text(later), member)
  end
  return ff.with_hints(ff.ok(what), execution and execution.hints or {})
end)
