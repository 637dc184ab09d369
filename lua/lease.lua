-- ff_renew_lease
--   keys:    core
--   args:    attempt_index lease_id lease_epoch lease_ttl_ms
--   returns: expires_at_ms lease_epoch
--   errors:  execution_not_found stale_owner suspended execution_not_active lease_expired invalid_input
--
-- A lapsed lease cannot be renewed: by then another worker may own the execution.
redis.register_function('ff_renew_lease', function(keys, args)
  local lease_ttl_ms = ff.integer(args[4])
  if not lease_ttl_ms or lease_ttl_ms < 1 then
    return ff.err('invalid_input', 'lease_ttl_ms')
  end
  local now = ff.now_ms()
  local core, refusal = ff.read_active(keys[1], args[1], args[2], args[3], now)
  if not core then
    return refusal
  end
  local expires_at = ff.text(now + lease_ttl_ms)
  redis.call('HSET', keys[1], 'lease_expires_at', expires_at, 'lease_ttl_ms', args[4])
  return ff.ok(expires_at, args[3])
end)
