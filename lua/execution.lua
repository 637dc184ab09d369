-- Creation, description, tags.

local POLICY = {
  'retry_max', 'retry_backoff', 'retry_delay_ms', 'retry_multiplier_percent', 'retry_max_delay_ms',
  'retry_jitter_percent', 'max_reclaims', 'attempt_timeout_ms',
}

-- ff_create_execution
--   keys:    core payload tags eligible flow
--   args:    execution_id namespace lane_id priority required_capabilities retention_ms delay_ms deadline_ms flow_id parent_id budget_ids retry_max retry_backoff retry_delay_ms retry_multiplier_percent retry_max_delay_ms retry_jitter_percent max_reclaims attempt_timeout_ms payload (tag value)...
--   returns: (lane_id eligible_score)...
--   errors:  invalid_input flow_not_found flow_already_terminal execution_not_found
--
-- The status is DUPLICATE, and nothing is changed, where the execution exists: a caller that lost the reply asks again,
-- and gets the hint again. `flow` is any key of the slot where flow_id is ''.
redis.register_function('ff_create_execution', function(keys, args)
  local call = redis.call
  local numbers = {}
  for _, index in ipairs({ 4, 6, 7, 8, 12, 14, 15, 16, 17, 18, 19 }) do
    numbers[index] = ff.integer(args[index])
    if not numbers[index] then
      return ff.err('invalid_input', 'argument ' .. index)
    end
  end
  if numbers[4] > 9000 or numbers[6] < 1 or (#args - 20) % 2 ~= 0 then
    return ff.err('invalid_input', 'argument')
  end
  local existing = ff.load(keys[1])
  if existing then
    if existing.state == 'waiting' then
      existing.hints = {
        existing.fields.lane_id,
        ff.eligible_score(tonumber(existing.fields.priority), tonumber(existing.fields.created_at)),
      }
    end
    local reply = ff.ok_with_hints(existing)
    reply[2] = 'DUPLICATE'
    return reply
  end
  local now = ff.now_ms()
  local fields = {
    'execution_id', args[1], 'namespace', args[2], 'lane_id', args[3], 'priority', args[4],
    'required_capabilities', args[5], 'retention_ms', args[6], 'created_at', ff.text(now),
    'last_transition_at', ff.text(now), 'total_attempt_count', '0', 'current_lease_epoch', '0', 'retry_count', '0',
    'reclaim_count', '0', 'state', numbers[7] > 0 and 'delayed' or 'waiting',
  }
  local function put(name, value)
    fields[#fields + 1] = name
    fields[#fields + 1] = value
  end
  if #args[9] > 0 then
    local flow = call('HGET', keys[5], 'state')
    if not flow then
      return ff.err('flow_not_found')
    end
    if flow ~= 'open' then
      return ff.err('flow_already_terminal')
    end
    put('flow_id', args[9])
  end
  if #args[10] > 0 then
    local tag = string.match(keys[1], '^ff:exec:(%b{}):')
    local parent = call('HGET', 'ff:exec:' .. tag .. ':' .. args[10] .. ':core', 'state')
    if not parent or ff.OUTCOMES[parent] then
      return ff.err('execution_not_found')
    end
    put('parent_id', args[10])
  end
  if #args[11] > 0 then
    put('budget_ids', args[11])
  end
  for i, name in ipairs(POLICY) do
    put(name, args[11 + i])
  end
  call('HSET', keys[1], unpack(fields))
  if #args[20] > 0 then
    call('SET', keys[2], args[20])
  end
  for i = 21, #args, 2 do
    call('HSET', keys[3], args[i], args[i + 1])
  end
  local x = ff.load(keys[1], now)
  if #args[9] > 0 then
    call('SADD', keys[5] .. ':members', x.id)
    call('SADD', keys[5] .. ':open', x.id)
    call('PERSIST', keys[5])
    call('PERSIST', keys[5] .. ':members')
  end
  if #args[10] > 0 then
    call('SADD', 'ff:exec:' .. x.tag .. ':' .. args[10] .. ':children', x.id)
  end
  if numbers[8] > 0 then
    ff.set_timer(x, 'deadline', now + numbers[8])
  end
  if numbers[7] > 0 then
    ff.set_timer(x, 'delay', now + numbers[7])
    return ff.ok()
  end
  local score = ff.eligible_score(numbers[4], now)
  call('ZADD', keys[4], score, x.id)
  return ff.ok(args[3], score)
end)

-- ff_describe_execution
--   keys:    core tags usage history
--   args:
--   returns: core tags usage history due suspension
--   errors:  execution_not_found
--
-- Field lists, and the newest 100 entries of the history. `due` has the times of the timers that are set, by kind. For
-- `lease` it is the end of the lease that runs: its timer may be earlier, as a renewal leaves it where it is.
redis.register_function({
  function_name = 'ff_describe_execution',
  callback = function(keys)
    local core = redis.call('HGETALL', keys[1])
    if #core == 0 then
      return ff.err('execution_not_found')
    end
    local x = ff.load(keys[1])
    local due = {}
    for _, kind in ipairs({ 'delay', 'deadline', 'attempt', 'suspension' }) do
      local score = redis.call('ZSCORE', x.timers, kind .. ':' .. x.id)
      if score then
        due[#due + 1] = kind
        due[#due + 1] = ff.text(tonumber(score))
      end
    end
    if x.state == 'active' then
      due[#due + 1] = 'lease'
      due[#due + 1] = ff.text(ff.lease_expires_at(x))
    end
    return ff.ok(
      core, redis.call('HGETALL', keys[2]), redis.call('HGETALL', keys[3]),
      redis.call('XREVRANGE', keys[4], '+', '-', 'COUNT', '100'), due,
      redis.call('HGETALL', x.prefix .. 'suspension:current')
    )
  end,
  flags = { 'no-writes' },
})

-- ff_describe_attempt
--   keys:    core log live meta summary
--   args:    attempt_index
--   returns: meta log_entries live_entries summary_version lease_left_ms
--   errors:  execution_not_found
redis.register_function({
  function_name = 'ff_describe_attempt',
  callback = function(keys, args)
    local core = redis.call('HMGET', keys[1], 'state', 'current_attempt_index')
    if not core[1] then
      return ff.err('execution_not_found')
    end
    local left = ''
    if core[1] == 'active' and core[2] == args[1] then
      left = ff.text(math.max((tonumber(redis.call('HGET', keys[4], 'lease_expires_at')) or 0) - ff.now_ms(), 0))
    end
    return ff.ok(
      redis.call('HGETALL', keys[4]), ff.text(redis.call('XLEN', keys[2])), ff.text(redis.call('XLEN', keys[3])),
      redis.call('HGET', keys[5], 'version') or '0', left
    )
  end,
  flags = { 'no-writes' },
})

-- ff_read_payload
--   keys:    core payload
--   args:
--   returns: payload
--   errors:  execution_not_found
--
-- The payload or the result of an execution: whichever key it is told.
redis.register_function({
  function_name = 'ff_read_payload',
  callback = function(keys)
    if redis.call('EXISTS', keys[1]) == 0 then
      return ff.err('execution_not_found')
    end
    return ff.ok(redis.call('GET', keys[2]) or '')
  end,
  flags = { 'no-writes' },
})

-- ff_set_tags
--   keys:    core tags
--   args:    (tag value)...
--   returns: tag_count
--   errors:  execution_not_found invalid_input
redis.register_function('ff_set_tags', function(keys, args)
  if #args == 0 or #args % 2 ~= 0 then
    return ff.err('invalid_input', 'tags')
  end
  if redis.call('EXISTS', keys[1]) == 0 then
    return ff.err('execution_not_found')
  end
  for i = 1, #args, 2 do
    redis.call('HSET', keys[2], args[i], args[i + 1])
  end
  local left = redis.call('PTTL', keys[1])
  if left > 0 then
    redis.call('PEXPIRE', keys[2], left)
  end
  return ff.ok(ff.text(redis.call('HLEN', keys[2])))
end)

-- ff_read_tags
--   keys:    core tags
--   args:
--   returns: (tag value)...
--   errors:  execution_not_found
redis.register_function({
  function_name = 'ff_read_tags',
  callback = function(keys)
    if redis.call('EXISTS', keys[1]) == 0 then
      return ff.err('execution_not_found')
    end
    return { 1, 'OK', redis.call('HGETALL', keys[2]) }
  end,
  flags = { 'no-writes' },
})
