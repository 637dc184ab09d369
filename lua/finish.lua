-- The ends of an execution. The call that ends it writes the end entry of its stream in the same step, and answers a
-- repeat by the same lease with the outcome of the first call.

-- Fence, move and end in one; `fields` are stored in the core, and `result`, unless it is empty, under its key.
local function finish(keys, args, to, fields, result_key, result)
  local now = ff.now_ms()
  local core, refusal = ff.read_fence(keys[1], args[1], args[2], args[3])
  if not core then
    return refusal
  end
  if core[1] == to then
    return ff.ok(to)
  end
  core, refusal = ff.read_active(keys[1], args[1], args[2], args[3], now)
  if not core then
    return refusal
  end
  local retention_ms = redis.call('HGET', keys[1], 'retention_ms')
  ff.move(keys[1], nil, nil, 'active', to, now)
  redis.call('HSET', keys[1], unpack(fields))
  ff.end_stream(keys[2], keys[3], keys[4], keys[5], now, ff.TERMINAL[to], retention_ms)
  if result_key and #result > 0 then
    redis.call('SET', result_key, result)
  end
  for i = 6, #keys do
    redis.call('PEXPIRE', keys[i], retention_ms)
  end
  redis.call('PEXPIRE', keys[1], retention_ms)
  return ff.ok(to)
end

-- ff_complete_execution
--   keys:    core log live meta summary attempt payload tags result
--   args:    attempt_index lease_id lease_epoch payload
--   returns: state
--   errors:  execution_not_found stale_owner suspended execution_not_active lease_expired
redis.register_function('ff_complete_execution', function(keys, args)
  return finish(keys, args, 'completed', { 'outcome', 'success' }, keys[9], args[4])
end)

-- ff_fail_execution
--   keys:    core log live meta summary attempt payload tags
--   args:    attempt_index lease_id lease_epoch message failure_class detail
--   returns: state
--   errors:  execution_not_found stale_owner suspended execution_not_active lease_expired
redis.register_function('ff_fail_execution', function(keys, args)
  return finish(keys, args, 'failed', {
    'outcome', 'failed', 'failure_reason', args[4], 'failure_class', args[5], 'failure_detail', args[6],
  })
end)
