-- What a deployment has: executions, queues of lanes, and how many executions are in which state. Every function here
-- is `no-writes`, and each call is about one partition and bounded.
--
-- Executions that have not ended are members `<execution id> <lane>` of one sorted set, see ff.OPEN_STATES. Those that
-- ended without success are in one set a state, by the time of their end; those that completed are in the stream of
-- completions. What an index names and the core denies is left out: keys of an ended execution expire, and the indexes
-- keep its name a little longer.

-- Members that a call looks at, of all indexes together, at some 0.7 us each, and the cores that it reads, at some 4.
local MEMBERS, CORES = 384, 96
-- Members and completions of one millisecond that are listed; a record costs some 5 us. There are more only where
-- somebody else writes to the index, and after the clock was set back: completions then share the last time.
local SAME_MS, SAME_COMPLETIONS = 1024, 128
-- Executions of one answer, and bytes of texts that are read for it, but for the last one.
local MOST, READ = 48, 262144
-- Bytes of a text that others have written, of a condition that is unpacked to be told, and signals of it.
local TEXT, CONDITION = 512, 512
-- Queues of one answer, and the failures that are looked at: how many, and how old.
local QUEUES, FAILURES, RECENT_MS = 128, 256, 3600000
-- Priorities of a queue that are looked at for the oldest execution. The score of an execution is the time at which it
-- was created, less this for each step of priority.
local PRIORITIES, STEP = 8, 1000000000000

local FIELDS = {
  'state', 'namespace', 'priority', 'created_at', 'last_transition_at', 'started_at', 'completed_at',
  'total_attempt_count', 'current_attempt_index', 'current_worker_id', 'current_worker_instance_id', 'retry_count',
  'failure_reason', 'failure_class', 'cancellation_reason', 'lane_id', 'flow_id', 'progress_percent',
}

-- Whether one place comes before another in the listing: newer first, then by id, the greater first.
local function precedes(ms, id, other_ms, other_id)
  return ms > other_ms or (ms == other_ms and id > other_id)
end

-- Adds members of a sorted set behind the place (`ms`, `id`), in the order of the listing. `base` is what their scores
-- have beyond the time. Returns the last place that was looked at; nil where the set has no more behind it.
local function from_set(found, key, state, base, ms, id, suffix, count)
  local before, offset, at, last_id = tonumber(ms), 0, nil, nil
  local page, passed
  local from = ff.text(base + (before or ff.STATE_SPAN - 1))
  if before and id == '' then
    -- Nothing of this time is behind the place.
    from, before = '(' .. from, nil
  end
  repeat
    -- Those with the time of the place itself, up to the place, come first, and are passed over.
    page = redis.call('ZREVRANGEBYSCORE', key, from, ff.text(base), 'WITHSCORES', 'LIMIT', offset, count)
    for i = 1, #page, 2 do
      local member_id, lane = string.match(page[i], '^(%S+)( .*)$')
      at, last_id = tonumber(page[i + 1]) - base, member_id or page[i]
      if member_id and (suffix == '' or lane == suffix) and (not before or precedes(before, id, at, member_id)) then
        found[#found + 1] = { ms = at, id = member_id, state = state }
      end
    end
    offset = offset + count
    passed = not before or (at and precedes(before, id, at, last_id))
  until #page < 2 * count or passed or offset >= SAME_MS
  if #page < 2 * count then
    return nil
  end
  return at, passed and last_id or ''
end

-- The same of the completions: their records stand by the time of the end.
local function from_completions(found, key, ms, id, count)
  local before, from, at, looked = tonumber(ms), ms, nil, 0
  if ms == '' then
    from = '+'
  elseif id == '' then
    from = '(' .. ms .. '-0'
  end
  local page, passed
  repeat
    page = redis.call('XREVRANGE', key, from, '-', 'COUNT', count)
    looked = looked + #page
    for _, entry in ipairs(page) do
      local fields, member_id, outcome = entry[2], nil, nil
      at = tonumber((ff.split_id(entry[1]))) or 0
      for i = 1, #fields, 2 do
        if fields[i] == 'execution_id' then
          member_id = fields[i + 1]
        elseif fields[i] == 'outcome' then
          outcome = fields[i + 1]
        end
      end
      if member_id and outcome == 'success' and (not before or precedes(before, id, at, member_id)) then
        found[#found + 1] = { ms = at, id = member_id, state = 'completed' }
      end
      from = '(' .. entry[1]
    end
    -- Records of one time stand in the order of their ends, so all of the last time may not have been read.
    passed = not before or (at and precedes(before, id, at + 1, ''))
  until #page < count or passed or looked >= SAME_COMPLETIONS
  if #page < count then
    return nil
  end
  return passed and at + 1 or at, ''
end

-- A text that others have written, at most so long.
local function shortened(text)
  return text and string.sub(text, 1, TEXT)
end

-- The core of a listed execution, as a table; nil where it is not in the state for which it is listed, or not wanted.
local function core_of(slot_tag, entry, suffix, namespace, tag_name, tag_value)
  local core_key = ff.key('core', slot_tag, entry.id)
  local fields = ff.hash_fields(core_key, FIELDS)
  if
    fields.state ~= entry.state or (namespace ~= '' and fields.namespace ~= namespace)
    or (suffix ~= '' and ' ' .. (fields.lane_id or '') ~= suffix)
    or (tag_name ~= '' and redis.call('HGET', ff.key('tags', slot_tag, entry.id), tag_name) ~= tag_value)
  then
    return nil
  end
  return fields
end

-- What a listing says of an execution, as a field list.
local function told_of(slot_tag, entry, fields)
  local flat = { 'id', entry.id, 'listed_at', ff.text(entry.ms) }
  local function add(name, value)
    if value then
      flat[#flat + 1], flat[#flat + 2] = name, value
    end
  end
  fields.failure_reason = shortened(fields.failure_reason)
  fields.cancellation_reason = shortened(fields.cancellation_reason)
  for _, name in ipairs(FIELDS) do
    add(name, fields[name])
  end
  local call, timers_key = redis.call, ff.key('timers', slot_tag)
  if entry.state == 'active' and fields.current_attempt_index then
    local head = ff.parse_head(call('GET', ff.key('head', slot_tag, entry.id .. ':' .. fields.current_attempt_index)))
    add('lease', head and ff.text(head.lease_expires_at))
  elseif entry.state == 'delayed' or entry.state == 'suspended' then
    local due = call('ZSCORE', timers_key, (entry.state == 'delayed' and 'delay:' or 'suspension:') .. entry.id)
    add('due', due and ff.text(tonumber(due)))
  end
  if entry.state == 'suspended' then
    local suspended = ff.describe_suspension({ slot_tag = slot_tag, id = entry.id }, CONDITION)
    for i = 1, #suspended, 2 do
      if string.find(suspended[i], '^waits:') or suspended[i] == 'reason' then
        add(suspended[i], shortened(suspended[i + 1]))
      end
    end
  end
  return flat
end

-- ff_list_executions
--   keys:    listed completions timers
--   args:    states lane_suffix namespace tag_name tag_value before_ms before_id count
--   returns: next_ms next_id executions
--   errors:  invalid_input
--
-- Executions of the partition in one of `states`, which are words with blanks between them: field lists of at most
-- `count`, behind the place (`before_ms`, `before_id`), where '' is the newest. The listing has the order of times, of
-- the creation of an execution that has not ended and of the end of one that has; in one millisecond that of ids, the
-- greater first. (`next_ms`, `next_id`) is the place from which the next call continues, '' where all was looked at.
-- `lane_suffix` is '', or a blank and the lane. Without a namespace or a tag, each of these is ''.
redis.register_function({
  function_name = 'ff_list_executions',
  callback = function(keys, args)
    local listed_key, completions_key, timers_key = unpack(keys, 1, 3)
    local states, lane_suffix, namespace, tag_name, tag_value, before_ms, before_id, count = unpack(args, 1, 8)
    local limit = ff.integer(count)
    if not limit or limit < 1 or not (before_ms == '' or ff.integer(before_ms)) then
      return ff.err('invalid_input', 'count')
    end
    local slot_tag, wanted = ff.slot_tag_of(timers_key), {}
    for state in string.gmatch(states, '%S+') do
      wanted[#wanted + 1] = state
    end
    local found, horizon_ms, horizon_id = {}, nil, nil
    local page = math.floor(MEMBERS / math.max(#wanted, 1))
    if lane_suffix == '' and namespace == '' and tag_name == '' then
      -- Most of what is found is listed.
      page = math.min(page, 2 * limit + 8)
    end
    for _, state in ipairs(wanted) do
      local number, ms, id = ff.OPEN_STATES[state], nil, nil
      if number then
        ms, id = from_set(found, listed_key, state, number * ff.STATE_SPAN, before_ms, before_id, lane_suffix, page)
      elseif state == 'completed' then
        ms, id = from_completions(found, completions_key, before_ms, before_id, page)
      elseif ff.OUTCOMES[state] then
        local key = ff.key('ended', slot_tag, state)
        ms, id = from_set(found, key, state, 0, before_ms, before_id, lane_suffix, page)
      end
      -- Up to this place all states are known.
      if ms and (not horizon_ms or precedes(ms, id, horizon_ms, horizon_id)) then
        horizon_ms, horizon_id = ms, id
      end
    end
    table.sort(found, function(one, other)
      return precedes(one.ms, one.id, other.ms, other.id)
    end)
    local listed, looked, read = {}, 0, 0
    for _, entry in ipairs(found) do
      if horizon_ms and precedes(horizon_ms, horizon_id, entry.ms, entry.id) then
        break
      end
      local intact, fields = ff.guarded(core_of, slot_tag, entry, lane_suffix, namespace, tag_name, tag_value)
      looked = looked + 1
      if intact and fields then
        read = read + #(fields.failure_reason or '') + #(fields.cancellation_reason or '')
        local whole, flat = ff.guarded(told_of, slot_tag, entry, fields)
        listed[#listed + 1] = whole and flat or nil
      end
      if #listed >= math.min(limit, MOST) or looked >= CORES or read >= READ then
        horizon_ms, horizon_id = entry.ms, entry.id
        break
      end
    end
    return ff.ok(horizon_ms and ff.text(horizon_ms) or '', horizon_id or '', listed)
  end,
  flags = { 'no-writes' },
})

-- When the oldest execution of a queue was created, as text: of those with one priority the first is the oldest.
local function oldest_in(eligible_key, now)
  local from, oldest = '-inf', nil
  for _ = 1, PRIORITIES do
    local score = tonumber(redis.call('ZRANGEBYSCORE', eligible_key, from, '+inf', 'WITHSCORES', 'LIMIT', 0, 1)[2])
    if not score then
      break
    end
    local steps = math.floor((now - score) / STEP)
    local created = score + steps * STEP
    if not oldest or created < oldest then
      oldest = created
    end
    from = '(' .. ff.text(now - steps * STEP)
  end
  return oldest and ff.text(oldest) or ''
end

-- ff_list_lanes
--   keys:    listed queues timers
--   args:    queue_after offset
--   returns: next_queue next_offset queues counts
--   errors:  invalid_input
--
-- `queues` has for each queue behind `queue_after` its name, as in the keys, how many executions wait in it, and when
-- the oldest was created. `counts` has `<state> <lane>` and a number: of the open executions that do not wait, from
-- `offset` on; and, where that is 0, of the failures of the last hour, of at most 256. Both are flat lists. The next
-- call continues with `next_queue` and `next_offset`, each '' where all was looked at, and '' asks for none of them.
redis.register_function({
  function_name = 'ff_list_lanes',
  callback = function(keys, args)
    local call = redis.call
    local listed_key, queues_key, timers_key = unpack(keys, 1, 3)
    local queue_after, offset = unpack(args, 1, 2)
    local slot_tag, now = ff.slot_tag_of(timers_key), ff.now_ms()
    local queues, counts, next_queue, next_offset = {}, {}, '', ''
    if queue_after ~= '' then
      local page = call('ZRANGEBYLEX', queues_key, queue_after, '+', 'LIMIT', 0, QUEUES)
      for _, queue in ipairs(page) do
        local eligible_key = ff.key('eligible', slot_tag, queue)
        local intact, waiting, oldest = ff.guarded(function()
          return ff.text(call('ZCARD', eligible_key)), oldest_in(eligible_key, now)
        end)
        if intact and waiting ~= '0' then
          queues[#queues + 1], queues[#queues + 2], queues[#queues + 3] = queue, waiting, oldest
        end
      end
      next_queue = #page == QUEUES and '(' .. page[QUEUES] or ''
    end
    local from = ff.integer(offset)
    if offset ~= '' and not from then
      return ff.err('invalid_input', 'offset')
    end
    if from then
      local names, sums = {}, {}
      for state, number in pairs(ff.OPEN_STATES) do
        names[number] = state
      end
      local function count(state, member)
        local name = state .. (string.match(member, '^%S+( .*)$') or ' ')
        sums[name] = (sums[name] or 0) + 1
      end
      local page = call('ZRANGEBYSCORE', listed_key, ff.text(2 * ff.STATE_SPAN), '+inf', 'WITHSCORES', 'LIMIT', from,
        MEMBERS)
      for i = 1, #page, 2 do
        local state = names[math.floor(tonumber(page[i + 1]) / ff.STATE_SPAN)]
        if state then
          count(state, page[i])
        end
      end
      next_offset = #page == 2 * MEMBERS and ff.text(from + MEMBERS) or ''
      if from == 0 then
        local since = ff.text(now - RECENT_MS)
        local ended_key = ff.key('ended', slot_tag, 'failed')
        local failed = call('ZREVRANGEBYSCORE', ended_key, '+inf', since, 'LIMIT', 0, FAILURES)
        for _, member in ipairs(failed) do
          count('failed', member)
        end
      end
      for name, sum in pairs(sums) do
        counts[#counts + 1], counts[#counts + 2] = name, ff.text(sum)
      end
    end
    return ff.ok(next_queue, next_offset, queues, counts)
  end,
  flags = { 'no-writes' },
})
