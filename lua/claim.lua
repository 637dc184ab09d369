-- Claim: one call picks the best execution of one lane and partition that the worker's capabilities cover.

local PAGE = 64
-- A call looks at no more executions than this, at about 1 us each; the caller continues from where it stopped.
local SCAN_LIMIT = 2048

-- The tokens of `required`, a comma-separated list, that are not in the set `offered`; comma-separated.
local function missing(offered, required)
  local tokens = {}
  for token in string.gmatch(required, '[^,]+') do
    if not offered[token] then
      tokens[#tokens + 1] = token
    end
  end
  return table.concat(tokens, ',')
end

local function head_score(eligible_key)
  return redis.call('ZRANGE', eligible_key, 0, 0, 'WITHSCORES')[2] or ''
end

-- The capabilities of a worker, as a set: args from `first` on.
local function offered_by(args, first)
  local offered = {}
  for i = first, #args do
    offered[args[i]] = true
  end
  return offered
end

-- Refuses the claim where foreign data would stop it behind its first write. With `take_over` the execution is active,
-- and its next attempt is claimed.
local function check_claim(execution, take_over)
  local fields = execution.fields
  local resumed = not take_over and fields.interrupted == '1'
  ff.check_move(execution)
  ff.core_number(execution, 'current_lease_epoch')
  ff.core_number(execution, 'total_attempt_count')
  local index = resumed and fields.current_attempt_index or fields.total_attempt_count
  ff.expect('attempt', ff.attempt_key(execution, 'attempt', index))
  if take_over then
    ff.expect('meta', ff.attempt_key(execution, 'meta', index))
  end
end

-- Puts a waiting execution under a lease. An interrupted attempt continues its stream; else a new attempt begins.
-- Returns execution_id attempt_index attempt_id lease_epoch expires_at_ms kind.
local function grant_lease(execution, worker_id, worker_instance_id, lease_id, lease_ttl_ms, new_attempt_id)
  local call = redis.call
  local fields, now = execution.fields, execution.now
  local resumed = fields.interrupted == '1'
  local index = resumed and fields.current_attempt_index or fields.total_attempt_count
  local attempt_id = resumed and fields.current_attempt_id or new_attempt_id
  local epoch = ff.text(ff.core_number(execution, 'current_lease_epoch') + 1)
  local attempts = ff.core_number(execution, 'total_attempt_count')
  local expires_at = ff.text(now + tonumber(lease_ttl_ms))
  ff.move(execution, 'active')
  ff.set(
    execution, 'current_attempt_index', index, 'current_attempt_id', attempt_id,
    'current_lease_digest', ff.lease_digest(lease_id), 'current_lease_epoch', epoch, 'lease_ttl_ms', lease_ttl_ms,
    'current_worker_id', worker_id, 'current_worker_instance_id', worker_instance_id,
    'started_at', fields.started_at or ff.text(now),
    'total_attempt_count', ff.text(resumed and attempts or attempts + 1), 'interrupted', ''
  )
  local meta_key = ff.attempt_key(execution, 'meta', index)
  call('HSET', ff.attempt_key(execution, 'attempt', index), 'attempt_id', attempt_id, 'attempt_index', index,
    'lease_epoch', epoch, 'worker_id', worker_id, 'worker_instance_id', worker_instance_id, 'started_at', ff.text(now))
  if resumed then
    call('HSET', meta_key, 'lease_expires_at', expires_at)
  else
    -- Ids of an execution never repeat: each attempt begins in a later millisecond than the last one ended in.
    local began = now
    if index ~= '0' then
      local previous_key = ff.attempt_key(execution, 'meta', ff.text(tonumber(index) - 1))
      local previous = call('HMGET', previous_key, 'last_id', 'closed_at')
      local ended = tonumber((ff.split_id(previous[1] or '0-0'))) or 0
      began = math.max(now, ended + 1, (tonumber(previous[2] or '0') or 0) + 1)
    end
    call('HSET', meta_key, 'lease_expires_at', expires_at, 'last_id', ff.text(began) .. '-0',
      'created_at', ff.text(began))
  end
  if fields.cancel_requested then
    call('HSET', meta_key, 'cancel_requested', '1')
  end
  ff.set_timer(execution, 'lease', expires_at)
  local limit = tonumber(resumed and fields.attempt_left_ms or fields.attempt_timeout_ms) or 0
  if limit > 0 then
    ff.set_timer(execution, 'attempt', now + limit)
  end
  local reclaimed = fields.reclaimed == '1'
  if reclaimed then
    ff.set(execution, 'reclaimed', '')
  end
  return { execution.id, index, attempt_id, epoch, expires_at, (resumed or reclaimed) and 'resumed' or 'fresh' }
end

-- ff_claim
--   keys:    eligible
--   args:    worker_id worker_instance_id lease_id lease_ttl_ms attempt_id offset capability...
--   returns: execution_id attempt_index attempt_id lease_epoch expires_at_ms kind next_score
--   errors:  invalid_input
--
-- With status NONE nothing matched, and the values are `next_offset next_score`; next_offset is '' at the end of the
-- index. next_score is the score of the best execution that stays, '' without one. A member whose execution is gone or
-- not waiting is removed from the index.
redis.register_function('ff_claim', function(keys, args)
  local call = redis.call
  local eligible_key = keys[1]
  local worker_id, worker_instance_id, lease_id, lease_ttl_ms, attempt_id, offset = unpack(args, 1, 6)
  if (ff.integer(lease_ttl_ms) or 0) < 1 then
    return ff.err('invalid_input', 'lease_ttl_ms')
  end
  offset = ff.integer(offset)
  if not offset then
    return ff.err('invalid_input', 'offset')
  end
  local offered = offered_by(args, 7)
  local slot_tag, scanned = ff.slot_tag_of(eligible_key), 0
  while true do
    local page = call('ZRANGE', eligible_key, offset, offset + PAGE - 1)
    for _, candidate in ipairs(page) do
      local core_key = ff.key('core', slot_tag, candidate)
      local core = call('HMGET', core_key, 'state', 'required_capabilities')
      if core[1] ~= 'waiting' then
        call('ZREM', eligible_key, candidate)
      elseif missing(offered, core[2]) ~= '' then
        offset = offset + 1
      else
        local execution = ff.load(core_key)
        if not ff.guarded(check_claim, execution) then
          -- Foreign data keeps an execution from being claimed, and must not keep those after it.
          offset = offset + 1
        elseif ff.flow_verdict_of(execution, 'waiting') == 'run' then
          local granted = grant_lease(execution, worker_id, worker_instance_id, lease_id, lease_ttl_ms, attempt_id)
          granted[#granted + 1] = head_score(eligible_key)
          return ff.ok(unpack(granted))
        end
        offset = offset + 1
      end
    end
    scanned = scanned + #page
    if #page < PAGE or scanned >= SCAN_LIMIT then
      return ff.reply('NONE', #page == PAGE and ff.text(offset) or '', head_score(eligible_key))
    end
  end
end)

-- ff_claim_execution
--   keys:    core
--   args:    worker_id worker_instance_id lease_id lease_ttl_ms attempt_id reclaim capability...
--   returns: execution_id attempt_index attempt_id lease_epoch expires_at_ms kind
--   errors:  execution_not_found execution_not_claimable capability_mismatch invalid_input
--
-- Claims one execution by its id. With reclaim '1' an active execution whose lease has lapsed is taken over as well:
-- its old attempt ends as producer_lost, and a new one begins.
redis.register_function('ff_claim_execution', function(keys, args)
  local core_key = keys[1]
  local worker_id, worker_instance_id, lease_id, lease_ttl_ms, attempt_id, reclaim = unpack(args, 1, 6)
  if (ff.integer(lease_ttl_ms) or 0) < 1 then
    return ff.err('invalid_input', 'lease_ttl_ms')
  end
  local execution = ff.load(core_key)
  if not execution then
    return ff.err('execution_not_found')
  end
  local lacking = missing(offered_by(args, 7), execution.fields.required_capabilities)
  if lacking ~= '' then
    return ff.err('capability_mismatch', lacking)
  end
  local take_over = reclaim == '1' and execution.state == 'active'
    and ff.lease_expires_at(execution) <= execution.now
  -- A take-over begins a new attempt, so its flow is asked as for an execution that waits.
  if ff.flow_verdict_of(execution, 'waiting') ~= 'run' or not (take_over or execution.state == 'waiting') then
    return ff.err('execution_not_claimable', execution.state)
  end
  check_claim(execution, take_over)
  if take_over then
    ff.lapse(execution)
    if execution.state ~= 'waiting' then
      return ff.err('execution_not_claimable', execution.state)
    end
  end
  return ff.ok(unpack(grant_lease(execution, worker_id, worker_instance_id, lease_id, lease_ttl_ms, attempt_id)))
end)
