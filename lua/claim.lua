-- Claim: one call picks the best execution of one lane and partition that the worker's capabilities cover.

local PAGE = 64
-- A call looks at this many executions at the most, about 1 us each; the caller goes on from where it stopped.
local SCAN_LIMIT = 2048

-- `required` is a comma-separated list, `offered` a set. Returns the tokens that are missing, comma-separated.
local function missing(offered, required)
  local tokens = {}
  for token in string.gmatch(required, '[^,]+') do
    if not offered[token] then
      tokens[#tokens + 1] = token
    end
  end
  return table.concat(tokens, ',')
end

local function head_score(eligible)
  return redis.call('ZRANGE', eligible, 0, 0, 'WITHSCORES')[2] or ''
end

local function offered_by(args, first)
  local offered = {}
  for i = first, #args do
    offered[args[i]] = true
  end
  return offered
end

-- Puts a waiting execution under a lease: args are worker_id worker_instance_id lease_id lease_ttl_ms attempt_id from
-- `at` on. An interrupted attempt goes on, with its stream; else a new one begins.
local function lease_out(x, args, at)
  local call = redis.call
  local fields = x.fields
  local resumed = fields.interrupted == '1'
  local index = resumed and fields.current_attempt_index or fields.total_attempt_count
  local attempt_id = resumed and fields.current_attempt_id or args[at + 4]
  local epoch = ff.text(tonumber(fields.current_lease_epoch) + 1)
  local expires_at = ff.text(x.now + tonumber(args[at + 3]))
  ff.move(x, 'active')
  ff.set(
    x, 'current_attempt_index', index, 'current_attempt_id', attempt_id, 'current_lease_id', args[at + 2],
    'current_lease_epoch', epoch, 'lease_ttl_ms', args[at + 3], 'current_worker_id', args[at],
    'current_worker_instance_id', args[at + 1], 'started_at', fields.started_at or ff.text(x.now),
    'total_attempt_count', resumed and fields.total_attempt_count or ff.text(tonumber(index) + 1), 'interrupted', ''
  )
  local keys = ff.attempt_keys(x, index)
  call('HSET', keys.attempt, 'attempt_id', attempt_id, 'attempt_index', index, 'lease_epoch', epoch,
    'worker_id', args[at], 'worker_instance_id', args[at + 1], 'started_at', ff.text(x.now))
  call('HSET', keys.meta, 'lease_expires_at', expires_at)
  if not resumed then
    call('HSET', keys.meta, 'last_id', ff.text(x.now) .. '-0', 'created_at', ff.text(x.now))
  end
  if fields.cancel_requested then
    call('HSET', keys.meta, 'cancel_requested', '1')
  end
  ff.set_timer(x, 'lease', expires_at)
  local limit = tonumber(resumed and fields.attempt_left_ms or fields.attempt_timeout_ms) or 0
  if limit > 0 then
    ff.set_timer(x, 'attempt', x.now + limit)
  end
  local reclaimed = fields.reclaimed == '1'
  if reclaimed then
    ff.set(x, 'reclaimed', '')
  end
  return { x.id, index, attempt_id, epoch, expires_at, (resumed or reclaimed) and 'resumed' or 'fresh' }
end

-- A member of a cancelled flow is not claimed any more, also before its own cancellation reaches it. Only an attempt
-- that had begun, and that the policy lets run, goes on.
local function flow_allows(x)
  if not x.fields.flow_id then
    return true
  end
  local flow = redis.call('HMGET', 'ff:flow:' .. x.tag .. ':' .. x.fields.flow_id, 'state', 'cancel_policy')
  return flow[1] == 'open' or (flow[2] ~= 'cancel_all' and x.fields.interrupted == '1')
end

-- ff_claim
--   keys:    eligible
--   args:    core_prefix worker_id worker_instance_id lease_id lease_ttl_ms attempt_id offset capability...
--   returns: execution_id attempt_index attempt_id lease_epoch expires_at_ms kind next_score
--   errors:  invalid_input
--
-- core_prefix is the core key of an execution up to its id. Status NONE has `next_offset next_score`: nothing matched;
-- next_offset is '' when everything was looked at. next_score is the score of the best execution that stays, '' when
-- there is none. A member whose execution is gone or not waiting is dropped from the index.
redis.register_function('ff_claim', function(keys, args)
  local call = redis.call
  local eligible = keys[1]
  local lease_ttl_ms, offset = ff.integer(args[5]), ff.integer(args[7])
  if not lease_ttl_ms or lease_ttl_ms < 1 then
    return ff.err('invalid_input', 'lease_ttl_ms')
  end
  if not offset then
    return ff.err('invalid_input', 'offset')
  end
  local offered = offered_by(args, 8)
  local scanned = 0
  while true do
    local page = call('ZRANGE', eligible, offset, offset + PAGE - 1)
    for _, candidate in ipairs(page) do
      local core_key = args[1] .. candidate .. ':core'
      local core = call('HMGET', core_key, 'state', 'required_capabilities')
      if core[1] ~= 'waiting' then
        call('ZREM', eligible, candidate)
      elseif missing(offered, core[2]) ~= '' then
        offset = offset + 1
      else
        local x = ff.load(core_key)
        if flow_allows(x) then
          local reply = lease_out(x, args, 2)
          reply[#reply + 1] = head_score(eligible)
          return ff.ok(unpack(reply))
        end
        offset = offset + 1
      end
    end
    scanned = scanned + #page
    if #page < PAGE or scanned >= SCAN_LIMIT then
      return { 1, 'NONE', #page == PAGE and ff.text(offset) or '', head_score(eligible) }
    end
  end
end)

-- ff_claim_execution
--   keys:    core
--   args:    worker_id worker_instance_id lease_id lease_ttl_ms attempt_id reclaim capability...
--   returns: execution_id attempt_index attempt_id lease_epoch expires_at_ms kind
--   errors:  execution_not_found execution_not_claimable capability_mismatch invalid_input
--
-- Claims one execution by its id. With reclaim '1' an active one whose lease has lapsed is taken over as well: its old
-- attempt ends as producer_lost, and a new one begins.
redis.register_function('ff_claim_execution', function(keys, args)
  local lease_ttl_ms = ff.integer(args[4])
  if not lease_ttl_ms or lease_ttl_ms < 1 then
    return ff.err('invalid_input', 'lease_ttl_ms')
  end
  local x = ff.load(keys[1])
  if not x then
    return ff.err('execution_not_found')
  end
  local lacking = missing(offered_by(args, 7), x.fields.required_capabilities)
  if lacking ~= '' then
    return ff.err('capability_mismatch', lacking)
  end
  if not flow_allows(x) then
    return ff.err('execution_not_claimable', x.state)
  end
  if args[6] == '1' and x.state == 'active' and ff.lease_expires_at(x) <= x.now then
    ff.lapse(x)
  end
  if x.state ~= 'waiting' then
    return ff.err('execution_not_claimable', x.state)
  end
  return ff.ok(unpack(lease_out(x, args, 1)))
end)
