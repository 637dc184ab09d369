-- The lease while it is held: renewal, progress, cooperative cancel; and its lapse.

-- ff_renew_lease
--   keys:    core
--   args:    attempt_index lease_id lease_epoch lease_ttl_ms
--   returns: expires_at_ms lease_epoch cancel_requested
--   errors:  execution_not_found stale_owner state_lost suspended execution_not_active lease_expired invalid_input
--
-- A lapsed lease cannot be renewed: by then another worker may own the execution. The timer of the lease stays where
-- it is; when it fires it finds the new end and moves there.
redis.register_function('ff_renew_lease', function(keys, args)
  local core_key = keys[1]
  local attempt_index, lease_id, lease_epoch, lease_ttl_ms = unpack(args, 1, 4)
  lease_ttl_ms = ff.integer(lease_ttl_ms)
  if not lease_ttl_ms or lease_ttl_ms < 1 then
    return ff.err('invalid_input', 'lease_ttl_ms')
  end
  local execution, refusal = ff.load_owned(core_key, attempt_index, lease_id, lease_epoch)
  if not execution then
    return refusal
  end
  local expires_at = math.min(execution.now + lease_ttl_ms, ff.MAX_MS)
  local due = redis.call('ZSCORE', execution.timers_key, 'lease:' .. execution.id)
  local head_key = ff.attempt_key(execution, 'head', attempt_index)
  local head = execution.heads[attempt_index]
  head.lease_expires_at = expires_at
  ff.write_head(head_key, head)
  -- A shorter lease than before must be found when it ends, not when the old one would have ended.
  if not due or tonumber(due) > expires_at then
    ff.set_timer(execution, 'lease', expires_at)
  end
  ff.publish(head_key, ff.PUSH.LEASE .. ff.text(lease_ttl_ms))
  return ff.ok(ff.text(expires_at), lease_epoch, execution.fields.cancel_requested == '1' and '1' or '0')
end)

-- ff_report_progress
--   keys:    core
--   args:    attempt_index lease_id lease_epoch percent message
--   returns:
--   errors:  execution_not_found stale_owner state_lost suspended execution_not_active lease_expired invalid_input
--
-- '' leaves percent or message as it is.
redis.register_function('ff_report_progress', function(keys, args)
  local core_key = keys[1]
  local attempt_index, lease_id, lease_epoch, percent, message = unpack(args, 1, 5)
  if #percent > 0 and (ff.integer(percent) or 101) > 100 then
    return ff.err('invalid_input', 'percent')
  end
  local execution, refusal = ff.load_owned(core_key, attempt_index, lease_id, lease_epoch)
  if not execution then
    return refusal
  end
  if #percent > 0 then
    ff.set(execution, 'progress_percent', percent)
  end
  if #message > 0 then
    ff.set(execution, 'progress_message', message)
  end
  ff.set(execution, 'progress_updated_at', ff.text(execution.now))
  return ff.ok()
end)

-- Handles the lapse of an active execution's lease: its producer is lost. The attempt ends, and the execution waits for
-- another worker, unless that has happened too often. `message` and `detail` are what the worker itself has said of it;
-- nil where it said nothing.
function ff.lapse(execution, message, detail)
  local count, most = ff.core_number(execution, 'reclaim_count') + 1, ff.core_number(execution, 'max_reclaims')
  if message then
    ff.set_failure(execution, message, 'infra_crash', detail, 'reclaim_count', ff.text(count))
  else
    ff.set(execution, 'reclaim_count', ff.text(count))
  end
  if count > most then
    if not message then
      ff.set(execution, 'failure_reason', 'max_reclaims_exceeded', 'failure_class', 'infra_crash')
    end
    ff.move(execution, 'failed', 'producer_lost')
  else
    ff.end_attempt(execution, 'producer_lost')
    -- The index of the attempt that replaces the lost one.
    ff.set(execution, 'reclaimed', execution.fields.total_attempt_count)
    ff.move(execution, 'waiting', 'producer_lost')
  end
end
