-- Claim: one call picks the best execution of one lane and partition that the worker's capabilities cover.

local PAGE = 64
-- A call looks at this many executions at the most, about 1 us each; the caller goes on from where it stopped.
local SCAN_LIMIT = 2048

-- `required` is a comma-separated list, `offered` a set.
local function covers(offered, required)
  for token in string.gmatch(required, '[^,]+') do
    if not offered[token] then
      return false
    end
  end
  return true
end

local function head_score(eligible)
  return redis.call('ZRANGE', eligible, 0, 0, 'WITHSCORES')[2] or ''
end

-- ff_claim
--   keys:    eligible
--   args:    key_prefix attempt_prefix stream_prefix worker_id worker_instance_id lease_id lease_ttl_ms attempt_id offset capability...
--   returns: execution_id attempt_index lease_epoch expires_at_ms next_score
--   errors:  invalid_input
--
-- The three prefixes are the keys of an execution up to its id. Status NONE has `next_offset next_score`: nothing
-- matched; next_offset is '' when everything was looked at. next_score is the score of the best execution that
-- stays, '' when there is none. A member whose execution is gone or not waiting is dropped from the index.
redis.register_function('ff_claim', function(keys, args)
  local call = redis.call
  local eligible, key_prefix = keys[1], args[1]
  local lease_ttl_ms, offset = ff.integer(args[7]), ff.integer(args[9])
  if not lease_ttl_ms or lease_ttl_ms < 1 then
    return ff.err('invalid_input', 'lease_ttl_ms')
  end
  if not offset then
    return ff.err('invalid_input', 'offset')
  end
  local offered = {}
  for i = 10, #args do
    offered[args[i]] = true
  end

  local scanned, execution_id, core_key, core = 0, nil, nil, nil
  while not execution_id do
    local page = call('ZRANGE', eligible, offset, offset + PAGE - 1)
    for _, candidate in ipairs(page) do
      core_key = key_prefix .. candidate .. ':core'
      core = call(
        'HMGET', core_key, 'state', 'required_capabilities', 'total_attempt_count', 'current_lease_epoch', 'started_at'
      )
      if core[1] ~= 'waiting' then
        call('ZREM', eligible, candidate)
      elseif covers(offered, core[2]) then
        execution_id = candidate
        break
      else
        offset = offset + 1
      end
    end
    scanned = scanned + #page
    if not execution_id and (#page < PAGE or scanned >= SCAN_LIMIT) then
      return { 1, 'NONE', #page == PAGE and ff.text(offset) or '', head_score(eligible) }
    end
  end

  local now = ff.now_ms()
  local attempt_index = core[3]
  local epoch = ff.text(tonumber(core[4]) + 1)
  local expires_at = ff.text(now + lease_ttl_ms)
  ff.move(core_key, eligible, execution_id, 'waiting', 'active', now)
  call(
    'HSET', core_key, 'current_attempt_index', attempt_index, 'current_attempt_id', args[8],
    'total_attempt_count', ff.text(tonumber(attempt_index) + 1), 'current_lease_id', args[6],
    'current_lease_epoch', epoch, 'lease_expires_at', expires_at, 'lease_ttl_ms', args[7],
    'current_worker_id', args[4], 'current_worker_instance_id', args[5],
    'started_at', core[5] or ff.text(now)
  )
  call(
    'HSET', args[2] .. execution_id .. ':' .. attempt_index, 'attempt_id', args[8], 'attempt_index', attempt_index,
    'lease_epoch', epoch, 'worker_id', args[4], 'worker_instance_id', args[5], 'started_at', ff.text(now)
  )
  call(
    'HSET', args[3] .. execution_id .. ':' .. attempt_index .. ':meta', 'last_sequence', '0', 'last_ms', '0',
    'created_at', ff.text(now)
  )
  return ff.ok(execution_id, attempt_index, epoch, expires_at, head_score(eligible))
end)
