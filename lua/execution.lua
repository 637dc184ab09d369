-- Creation, description, tags.

-- Most tags of an execution.
ff.MAX_TAGS = 256

-- The numbers among the arguments of ff_create_execution that must be at most 2^53-1 and whole.
local function all_integers(...)
  for i = 1, select('#', ...) do
    if not ff.integer((select(i, ...))) then
      return false
    end
  end
  return true
end

-- ff_create_execution
--   keys:    core payload tags flow
--   args:    execution_id namespace lane_id priority required_capabilities retention_ms delay_ms deadline_ms
--            flow_id parent_id budget_ids retry_max retry_backoff retry_delay_ms retry_multiplier_percent
--            retry_max_delay_ms retry_jitter_percent max_reclaims attempt_timeout_ms payload (tag value)...
--   returns: (lane_id required_capabilities eligible_score)...
--   errors:  invalid_input flow_not_found flow_already_terminal execution_not_found
--
-- The status is DUPLICATE, and nothing is changed, where the execution exists: a caller that lost the reply asks again,
-- and gets the hint again. `flow` is any key of the slot where flow_id is ''. The pair `traceparent` is no tag, and
-- stands in the core: the span of whoever creates the execution.
redis.register_function('ff_create_execution', function(keys, args)
  local call = redis.call
  local core_key, payload_key, tags_key, flow_key = unpack(keys, 1, 4)
  local execution_id, namespace, lane_id, priority, required_capabilities, retention_ms, delay_ms, deadline_ms,
    flow_id, parent_id, budget_ids, retry_max, retry_backoff, retry_delay_ms, retry_multiplier_percent,
    retry_max_delay_ms, retry_jitter_percent, max_reclaims, attempt_timeout_ms, payload = unpack(args, 1, 20)
  if
    not all_integers(priority, retention_ms, delay_ms, deadline_ms, retry_max, retry_delay_ms,
      retry_multiplier_percent, retry_max_delay_ms, retry_jitter_percent, max_reclaims, attempt_timeout_ms)
    or tonumber(priority) > 9000 or tonumber(retention_ms) < 1 or (#args - 20) % 2 ~= 0
    or (#args - 20) / 2 > ff.MAX_TAGS + 1
  then
    return ff.err('invalid_input', 'argument')
  end
  local existing = ff.load(core_key)
  if existing then
    local fields, hints = existing.fields, {}
    if existing.state == 'waiting' and not ff.is_named(existing) then
      local score = ff.eligible_score(tonumber(fields.priority), tonumber(fields.created_at))
      hints = { fields.lane_id, fields.required_capabilities, score }
    end
    return ff.with_hints(ff.reply('DUPLICATE'), hints)
  end
  if #flow_id > 0 then
    local flow = call('HGET', flow_key, 'state')
    if not flow then
      return ff.err('flow_not_found')
    end
    if flow ~= 'open' then
      return ff.err('flow_already_terminal')
    end
  end
  local slot_tag = ff.slot_tag_of(core_key)
  if #parent_id > 0 then
    local parent = call('HGET', ff.key('core', slot_tag, parent_id), 'state')
    if not parent or ff.OUTCOMES[parent] then
      return ff.err('execution_not_found')
    end
  end

  local now = ff.now_ms()
  -- The fields that timers and indexes need.
  local execution = ff.execution_of(core_key, {
    lane_id = lane_id, required_capabilities = required_capabilities, priority = priority, created_at = ff.text(now),
  }, now)
  local delayed = tonumber(delay_ms) > 0
  if not delayed and required_capabilities ~= '' then
    ff.expect_index(execution)
  end
  if delayed or tonumber(deadline_ms) > 0 then
    ff.expect('timers', execution.timers_key)
  end
  if #args > 20 then
    ff.expect('tags', tags_key)
  end
  if #flow_id > 0 then
    ff.expect('flow_members', ff.key('flow_members', slot_tag, flow_id))
    ff.expect('flow_open', ff.key('flow_open', slot_tag, flow_id))
  end
  if #parent_id > 0 then
    ff.expect('children', ff.key('children', slot_tag, parent_id))
  end

  if not delayed then
    -- The first write: it fails where the index is foreign data.
    ff.enqueue(execution)
  end
  -- What changes later stands first: a small hash is looked through from its beginning.
  call('HSET', core_key, 'state', delayed and 'delayed' or 'waiting', 'last_transition_at', ff.text(now),
    'total_attempt_count', '0', 'current_lease_epoch', '0', 'retry_count', '0', 'reclaim_count', '0',
    'execution_id', execution_id, 'namespace', namespace, 'lane_id', lane_id,
    'priority', priority, 'required_capabilities', required_capabilities, 'retention_ms', retention_ms,
    'created_at', ff.text(now), 'retry_max', retry_max,
    'retry_backoff', retry_backoff, 'retry_delay_ms', retry_delay_ms,
    'retry_multiplier_percent', retry_multiplier_percent, 'retry_max_delay_ms', retry_max_delay_ms,
    'retry_jitter_percent', retry_jitter_percent, 'max_reclaims', max_reclaims,
    'attempt_timeout_ms', attempt_timeout_ms)
  ff.list_open(execution, delayed and 'delayed' or 'waiting')
  for name, id in pairs({ flow_id = flow_id, parent_id = parent_id, budget_ids = budget_ids }) do
    if #id > 0 then
      call('HSET', core_key, name, id)
    end
  end
  if #payload > 0 then
    call('SET', payload_key, payload)
  end
  for i = 21, #args, 2 do
    call('HSET', args[i] == 'traceparent' and core_key or tags_key, args[i], args[i + 1])
  end
  if #flow_id > 0 then
    local members_key = ff.key('flow_members', slot_tag, flow_id)
    call('SADD', members_key, execution_id)
    call('ZADD', ff.key('flow_open', slot_tag, flow_id), '0', execution_id)
    call('PERSIST', flow_key)
    call('PERSIST', members_key)
  end
  if #parent_id > 0 then
    call('SADD', ff.key('children', slot_tag, parent_id), execution_id)
  end
  if tonumber(deadline_ms) > 0 then
    ff.set_timer(execution, 'deadline', now + deadline_ms)
  end
  if delayed then
    ff.set_timer(execution, 'delay', now + delay_ms)
  end
  return ff.with_hints(ff.ok(), execution.hints)
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
    local call = redis.call
    local core_key, tags_key, usage_key, history_key = unpack(keys, 1, 4)
    local core = call('HGETALL', core_key)
    if #core == 0 then
      return ff.err('execution_not_found')
    end
    local execution = ff.load(core_key)
    local due = {}
    for _, kind in ipairs({ 'delay', 'deadline', 'attempt', 'suspension' }) do
      local score = call('ZSCORE', execution.timers_key, kind .. ':' .. execution.id)
      if score then
        due[#due + 1] = kind
        due[#due + 1] = ff.text(tonumber(score))
      end
    end
    if execution.state == 'active' then
      due[#due + 1] = 'lease'
      due[#due + 1] = ff.text(ff.lease_expires_at(execution))
    end
    return ff.ok(
      core, call('HGETALL', tags_key), call('HGETALL', usage_key),
      call('XREVRANGE', history_key, '+', '-', 'COUNT', '100'), due,
      execution.state == 'suspended' and ff.describe_suspension(execution) or {}
    )
  end,
  flags = { 'no-writes' },
})

-- What the server tells of a stream, added to a field list under a prefix: entries added so far, and the id of the
-- first that stands there, with the number of its frames.
local function describe_stream(flat, stream_key, prefix)
  local info = redis.pcall('XINFO', 'STREAM', stream_key)
  for i = 1, #info, 2 do
    local name, value = info[i], info[i + 1]
    if name == 'entries-added' then
      flat[#flat + 1], flat[#flat + 2] = prefix .. '_added', ff.text(value)
    elseif name == 'first-entry' and value then
      flat[#flat + 1], flat[#flat + 2] = prefix .. '_first', value[1]
      for at = 1, #value[2], 2 do
        if value[2][at] == 'run' then
          flat[#flat + 1], flat[#flat + 2] = prefix .. '_first_frames', ff.text(ff.run_count(value[2][at + 1]))
        end
      end
    end
  end
end

-- ff_describe_attempt
--   keys:    core log live head summary attempt
--   args:    attempt_index
--   returns: meta log_entries live_entries summary_version lease_left_ms attempt streams
--   errors:  execution_not_found
--
-- `meta`, `attempt` and `streams` are field lists. `streams` has for the log and the live window `<which>_added`, the
-- entries added so far, `<which>_first`, the id of the first entry, and `live_first_frames`, how many frames that is.
redis.register_function({
  function_name = 'ff_describe_attempt',
  callback = function(keys, args)
    local call = redis.call
    local core_key, log_key, live_key, head_key, summary_key, attempt_key = unpack(keys, 1, 6)
    local attempt_index = args[1]
    local state, current_index = unpack(call('HMGET', core_key, 'state', 'current_attempt_index'))
    if not state then
      return ff.err('execution_not_found')
    end
    local head, left = ff.read_head(head_key), ''
    if state == 'active' and current_index == attempt_index then
      local expires_at = head and head.lease_expires_at or 0
      left = ff.text(math.max(expires_at - ff.now_ms(), 0))
    end
    local meta = call('HGETALL', ff.meta_beside(head_key))
    if head then
      meta[#meta + 1], meta[#meta + 2] = 'last_id', head.last_id
    end
    local attempt, streams = {}, {}
    for name, value in pairs(ff.hash_fields(attempt_key, { 'worker_id', 'worker_instance_id', 'started_at' })) do
      attempt[#attempt + 1], attempt[#attempt + 2] = name, value
    end
    describe_stream(streams, log_key, 'log')
    describe_stream(streams, live_key, 'live')
    return ff.ok(
      meta, ff.text(call('XLEN', log_key)), ff.text(call('XLEN', live_key)),
      call('HGET', summary_key, 'version') or '0', left, attempt, streams
    )
  end,
  flags = { 'no-writes' },
})

-- ff_read_payload
--   keys:    core payload
--   args:
--   returns: payload (traceparent)...
--   errors:  execution_not_found
--
-- The payload or the result of an execution: `payload` is the key of either. There is one traceparent or none.
redis.register_function({
  function_name = 'ff_read_payload',
  callback = function(keys)
    local core_key, payload_key = unpack(keys, 1, 2)
    local state, traceparent = unpack(redis.call('HMGET', core_key, 'state', 'traceparent'))
    if not state then
      return ff.err('execution_not_found')
    end
    local payload = redis.call('GET', payload_key) or ''
    if not traceparent then
      return ff.ok(payload)
    end
    return ff.ok(payload, traceparent)
  end,
  flags = { 'no-writes' },
})

-- ff_set_tags
--   keys:    core tags
--   args:    (tag value)...
--   returns: tag_count
--   errors:  execution_not_found invalid_input
redis.register_function('ff_set_tags', function(keys, args)
  local call = redis.call
  local core_key, tags_key = unpack(keys, 1, 2)
  if #args == 0 or #args % 2 ~= 0 or #args / 2 > ff.MAX_TAGS then
    return ff.err('invalid_input', 'tags')
  end
  if call('EXISTS', core_key) == 0 then
    return ff.err('execution_not_found')
  end
  local new = 0
  for i = 1, #args, 2 do
    new = new + 1 - call('HEXISTS', tags_key, args[i])
  end
  if call('HLEN', tags_key) + new > ff.MAX_TAGS then
    return ff.err('invalid_input', 'tags')
  end
  ff.write_list('HSET', tags_key, args)
  local left = call('PTTL', core_key)
  if left > 0 then
    call('PEXPIRE', tags_key, left)
  end
  return ff.ok(ff.text(call('HLEN', tags_key)))
end)

-- ff_read_tags
--   keys:    core tags
--   args:    tag_name
--   returns: tags
--   errors:  execution_not_found
--
-- One field list, with that tag alone, or with all where the name is ''.
redis.register_function({
  function_name = 'ff_read_tags',
  callback = function(keys, args)
    local core_key, tags_key = unpack(keys, 1, 2)
    local tag_name = unpack(args, 1, 1)
    if redis.call('EXISTS', core_key) == 0 then
      return ff.err('execution_not_found')
    end
    if tag_name and tag_name ~= '' then
      local value = redis.call('HGET', tags_key, tag_name)
      return ff.ok(value and { tag_name, value } or {})
    end
    return ff.ok(redis.call('HGETALL', tags_key))
  end,
  flags = { 'no-writes' },
})
