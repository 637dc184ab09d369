-- The lease while it is held: renewal, progress, cooperative cancel; and its lapse.

-- ff_renew_lease
--   keys:    core
--   args:    attempt_index lease_id lease_epoch lease_ttl_ms
--   returns: expires_at_ms lease_epoch cancel_requested
--   errors:  execution_not_found stale_owner suspended execution_not_active lease_expired invalid_input
--
-- A lapsed lease cannot be renewed: by then another worker may own the execution. The timer of the lease stays where
-- it is; when it fires it finds the new end and moves there.
redis.register_function('ff_renew_lease', function(keys, args)
  local lease_ttl_ms = ff.integer(args[4])
  if not lease_ttl_ms or lease_ttl_ms < 1 then
    return ff.err('invalid_input', 'lease_ttl_ms')
  end
  local x, refusal = ff.owned(keys[1], args)
  if not x then
    return refusal
  end
  local expires_at = ff.text(x.now + lease_ttl_ms)
  redis.call('HSET', ff.attempt_keys(x, args[1]).meta, 'lease_expires_at', expires_at)
  -- A shorter lease than before must be found when it ends, not when the old one would have.
  local due = redis.call('ZSCORE', x.timers, 'lease:' .. x.id)
  if not due or tonumber(due) > x.now + lease_ttl_ms then
    ff.set_timer(x, 'lease', expires_at)
  end
  return ff.ok(expires_at, args[3], x.fields.cancel_requested == '1' and '1' or '0')
end)

-- ff_report_progress
--   keys:    core
--   args:    attempt_index lease_id lease_epoch percent message
--   returns:
--   errors:  execution_not_found stale_owner suspended execution_not_active lease_expired invalid_input
--
-- '' leaves percent or message as it is.
redis.register_function('ff_report_progress', function(keys, args)
  local percent = ff.integer(args[4])
  if #args[4] > 0 and (not percent or percent > 100) then
    return ff.err('invalid_input', 'percent')
  end
  local x, refusal = ff.owned(keys[1], args)
  if not x then
    return refusal
  end
  if percent then
    ff.set(x, 'progress_percent', args[4])
  end
  if #args[5] > 0 then
    ff.set(x, 'progress_message', args[5])
  end
  ff.set(x, 'progress_updated_at', ff.text(x.now))
  return ff.ok()
end)

-- The lease of an active execution has lapsed: its producer is lost. The attempt ends, and the execution waits for
-- another worker, unless that has happened too often. With `reported` the worker itself has said why, and its words
-- stay.
function ff.lapse(x, reported)
  local count = tonumber(x.fields.reclaim_count) + 1
  ff.set(x, 'reclaim_count', ff.text(count))
  if count > tonumber(x.fields.max_reclaims) then
    if not reported then
      ff.set(x, 'failure_reason', 'max_reclaims_exceeded', 'failure_class', 'infra_crash')
    end
    ff.move(x, 'failed', 'producer_lost')
  else
    ff.end_attempt(x, 'producer_lost')
    ff.set(x, 'reclaimed', '1')
    ff.move(x, 'waiting', 'producer_lost')
  end
end
