-- Timers: one set per partition, member `<kind>:<execution id>[:<more>]`, score when it is due. A supervisor reads what
-- is due and fires each by a call that looks again, so any number of supervisors may run. A timer that has nothing to
-- do is removed; one that is early is moved; none stays due.

-- Whether a supervisor with this filter is the one to handle the execution.
local function wanted(x, namespace, tag_name, tag_value)
  if namespace ~= '' and x.fields.namespace ~= namespace then
    return false
  end
  return tag_name == '' or redis.call('HGET', x.prefix .. 'tags', tag_name) == tag_value
end

local FIRE = {}

function FIRE.lease(x)
  if x.state ~= 'active' then
    return 'done'
  end
  local expires_at = ff.lease_expires_at(x)
  if expires_at > x.now then
    return 'later', expires_at
  end
  ff.lapse(x)
  return 'done'
end

function FIRE.delay(x)
  if x.state == 'delayed' then
    ff.move(x, 'waiting')
  end
  return 'done'
end

function FIRE.attempt(x)
  if x.state == 'active' then
    ff.set(x, 'failure_reason', 'attempt_timeout', 'failure_class', 'timeout')
    ff.fail_attempt(x, 'timeout', 'expired', 'attempt_timeout')
  end
  return 'done'
end

function FIRE.deadline(x)
  if not ff.OUTCOMES[x.state] then
    ff.set(x, 'failure_reason', 'execution_deadline')
    ff.move(x, 'expired')
  end
  return 'done'
end

function FIRE.suspension(x)
  if x.state == 'suspended' then
    ff.expire_suspension(x)
  end
  return 'done'
end

function FIRE.cancel(x)
  -- Whatever became of the attempt in the meantime: nothing of it is to go on.
  if not ff.OUTCOMES[x.state] then
    ff.set(x, 'cancelled_from', x.state)
    ff.move(x, 'cancelled')
  end
  return 'done'
end

function FIRE.waitpoint(x, waitpoint)
  if redis.call('HGET', 'ff:wp:' .. x.tag .. ':' .. waitpoint, 'state') == 'pending' then
    ff.close_waitpoint(x, waitpoint, 'never_committed')
  end
  return 'done'
end

-- ff_fire_timer
--   keys:    timers core
--   args:    member kind more namespace tag_name tag_value
--   returns: what (lane_id eligible_score)...
--   errors:
--
-- what: `done`, `later`, or `skipped` where the filter leaves the execution to another supervisor.
redis.register_function('ff_fire_timer', function(keys, args)
  local call = redis.call
  local due = call('ZSCORE', keys[1], args[1])
  if not due then
    return ff.ok('done')
  end
  local x = ff.load(keys[2])
  if not x or not FIRE[args[2]] then
    call('ZREM', keys[1], args[1])
    return ff.ok('done')
  end
  if tonumber(due) > x.now then
    return ff.ok('later')
  end
  if not wanted(x, args[4], args[5], args[6]) then
    return ff.ok('skipped')
  end
  local what, later = FIRE[args[2]](x, args[3])
  if what == 'later' then
    call('ZADD', keys[1], ff.text(later), args[1])
  else
    call('ZREM', keys[1], args[1])
  end
  return ff.ok_with_hints(x, what)
end)
