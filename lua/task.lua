-- Tasks of agents: a document under compare-and-swap, with the log of the events that changed it.
--
-- A task is one hash in the slot of its name, and its log a stream beside it. Owners do not see each other's tasks, and
-- may have tasks of one name: the hash has the fields `<owner>:<name>` of each of them, `<owner>` being a digest. The
-- log is common, as those who read it name no owner. What lists the tasks of an owner is in the owner's own slot:
--   order  sorted set: task to the time of its status in microseconds, -1 where it has none
--   due    sorted set: task to the time in ms at which it is removed
--   facts  hash: task to `<version> <state> <context>`, as of the last save that was noted

local SCAN_LIMIT = 1024
local PAGE = 128
-- Events of one answer, unless one alone is larger.
local EVENT_PAGE, EVENT_BYTES = 8, 524288

local FIELDS = { 'version', 'ended', 'save', 'document' }

local function fields_of(owner, count)
  local names = {}
  for i = 1, count do
    names[i] = owner .. ':' .. FIELDS[i]
  end
  return names
end

-- ff_save_task
--   keys:    task task_events
--   args:    owner prev_version kind save_id ttl_ms document event
--   returns: version
--   errors:  invalid_input
--
-- Stores the document where the stored version is `prev_version`, 0 for none, and appends the event, '' for none.
-- `kind` is 'ended' where the document is that of a task that has ended; 'cancelled' where it is cancelled, which
-- replaces any version of a task that has not ended; else ''. Status CONFLICT: another version is stored. The last save
-- may be repeated, and is recognised by its id. Both keys are removed `ttl_ms` after the last save.
redis.register_function('ff_save_task', function(keys, args)
  local call = redis.call
  local task_key, task_events_key = unpack(keys, 1, 2)
  local owner, prev_version, kind, save_id, ttl_ms, document, event = unpack(args, 1, 7)
  local previous = ff.integer(prev_version)
  if not previous or (ff.integer(ttl_ms) or 0) < 1 or not event then
    return ff.err('invalid_input', 'argument')
  end
  local names = fields_of(owner, 4)
  local version, ended, saved = unpack(call('HMGET', task_key, unpack(names, 1, 3)))
  if version and saved == save_id then
    return ff.ok(version)
  end
  local stored = version and (ff.integer(version) or ff.corrupt('task')) or 0
  if kind == 'cancelled' then
    if stored == 0 or ended == '1' then
      return ff.reply('CONFLICT', ff.text(stored))
    end
  elseif stored ~= previous then
    return ff.reply('CONFLICT', ff.text(stored))
  end
  ff.expect('task_events', task_events_key)
  local new = ff.text(stored + 1)
  -- It fails where the stream has reached the last id there is, so it comes first.
  if event ~= '' then
    call('XADD', task_events_key, '*', 'version', new, 'event', event)
  end
  call('HSET', task_key, names[1], new, names[2], kind == '' and '' or '1', names[3], save_id, names[4], document)
  call('PEXPIRE', task_key, ttl_ms)
  call('PEXPIRE', task_events_key, ttl_ms)
  ff.publish(task_events_key, ff.PUSH.CHANGED)
  return ff.ok(new)
end)

-- ff_read_task
--   keys:    task task_events
--   args:    owner after count
--   returns: exists version document more events
--   errors:  invalid_input
--
-- The document of an owner, and events after the id `after`, at most `count` and some bytes of them, each as id,
-- version and text. `exists` is '1' where some owner has the task. `more` is '1' where more events may follow.
redis.register_function({
  function_name = 'ff_read_task',
  callback = function(keys, args)
    local call = redis.call
    local task_key, task_events_key = unpack(keys, 1, 2)
    local owner, after, count = unpack(args, 1, 3)
    local most = ff.integer(count)
    if not most then
      return ff.err('invalid_input', 'count')
    end
    local version, document = unpack(call('HMGET', task_key, owner .. ':version', owner .. ':document'))
    local exists = (version or call('EXISTS', task_key) == 1) and '1' or ''
    local events, bytes, more = {}, 0, most > 0
    while more and #events < 3 * most and bytes < EVENT_BYTES do
      local page = call('XRANGE', task_events_key, '(' .. after, '+', 'COUNT', ff.text(EVENT_PAGE))
      for _, entry in ipairs(page) do
        local given = {}
        for i = 1, #entry[2], 2 do
          given[entry[2][i]] = entry[2][i + 1]
        end
        after = entry[1]
        if given.version and given.event then
          events[#events + 1] = after
          events[#events + 1] = given.version
          events[#events + 1] = given.event
          bytes = bytes + #given.event
        end
      end
      more = #page == EVENT_PAGE
    end
    return ff.ok(exists, version or '0', document or '', more and '1' or '', events)
  end,
  flags = { 'no-writes' },
})

-- ff_delete_task
--   keys:    task task_events
--   args:    owner
--   returns: existed
--   errors:
--
-- Removes the task of an owner; with the last one of its name, the log as well.
redis.register_function('ff_delete_task', function(keys, args)
  local call = redis.call
  local task_key, task_events_key = unpack(keys, 1, 2)
  local owner = unpack(args, 1, 1)
  local removed = call('HDEL', task_key, unpack(fields_of(owner, 4)))
  if call('EXISTS', task_key) == 0 then
    call('UNLINK', task_events_key)
  end
  ff.publish(task_events_key, ff.PUSH.CHANGED)
  return ff.ok(removed > 0 and '1' or '')
end)

-- ff_note_task
--   keys:    task_order task_due task_facts
--   args:    task_id version time_us state context ttl_ms
--   returns: noted
--   errors:  invalid_input
--
-- Lists a task among those of its owner, as of a version of it, unless a later one is noted. Version 0 is that of a
-- task about to be stored, and is noted unless the task is listed. Without a time, '', the task is taken from the list.
-- Tasks whose time is over are taken from it, some of them in each call.
redis.register_function('ff_note_task', function(keys, args)
  local call = redis.call
  local task_order_key, task_due_key, task_facts_key = unpack(keys, 1, 3)
  local task_id, version, time_us, state, context, ttl_ms = unpack(args, 1, 6)
  local number, ttl = ff.integer(version), ff.integer(ttl_ms)
  if not number or not ttl or ttl < 1 or not (time_us == '' or time_us == '-1' or ff.integer(time_us)) then
    return ff.err('invalid_input', 'argument')
  end
  ff.expect('task_order', task_order_key)
  local now = ff.now_ms()
  local facts, due = call('HGET', task_facts_key, task_id), call('ZSCORE', task_due_key, task_id)
  local noted = facts and due and tonumber(due) > now and ff.integer(string.match(facts, '^(%d+) '))
  local late = call('ZRANGEBYSCORE', task_due_key, '-inf', ff.text(now), 'LIMIT', '0', '64')
  if #late > 0 then
    call('ZREM', task_due_key, unpack(late))
    call('ZREM', task_order_key, unpack(late))
    call('HDEL', task_facts_key, unpack(late))
  end
  if time_us == '' then
    call('ZREM', task_due_key, task_id)
    call('ZREM', task_order_key, task_id)
    call('HDEL', task_facts_key, task_id)
    return ff.ok('1')
  end
  if noted and (number == 0 or noted > number) then
    return ff.ok('')
  end
  call('ZADD', task_order_key, time_us, task_id)
  call('ZADD', task_due_key, ff.text(now + ttl), task_id)
  call('HSET', task_facts_key, task_id, version .. ' ' .. state .. ' ' .. context)
  for _, key in ipairs(keys) do
    -- A shorter time must not end what another one keeps.
    if call('PTTL', key) < ttl then
      call('PEXPIRE', key, ttl_ms)
    end
  end
  return ff.ok('1')
end)

-- Whether a text is less than another one as the server sorts members: byte by byte, in no language.
local function is_less(text, other)
  for i = 1, math.min(#text, #other) do
    local one, two = string.byte(text, i), string.byte(other, i)
    if one ~= two then
      return one < two
    end
  end
  return #text < #other
end

-- The rank, from the highest, of the first member behind a place, which need not be that of a member.
local function rank_behind(key, score, member)
  local low, high = 0, redis.call('ZCARD', key)
  while low < high do
    local middle = math.floor((low + high) / 2)
    local found = redis.call('ZREVRANGE', key, middle, middle, 'WITHSCORES')
    local its_score = tonumber(found[2])
    if its_score < score or (its_score == score and is_less(found[1], member)) then
      high = middle
    else
      low = middle + 1
    end
  end
  return low
end

-- ff_list_tasks
--   keys:    task_order task_facts
--   args:    state context least_us below_us below_id count
--   returns: next_us next_id all (task_id time_us)...
--   errors:  invalid_input
--
-- Tasks of an owner that have the state and the context, '' for any, and a time of at least `least_us`, the latest
-- first: those that follow the place `below_us` and `below_id`, '+inf' for the beginning. At most `count` of them,
-- found among a bounded number: the next call goes on from `next_us` and `next_id`, '' where none follow. `all` is how
-- many tasks have at least that time, whatever their state and context.
redis.register_function({
  function_name = 'ff_list_tasks',
  callback = function(keys, args)
    local call = redis.call
    local task_order_key, task_facts_key = unpack(keys, 1, 2)
    local state, context, least_us, below_us, below_id, count = unpack(args, 1, 6)
    local most = ff.integer(count)
    if not most or most < 1 then
      return ff.err('invalid_input', 'count')
    end
    local found = { '', '', ff.text(call('ZCOUNT', task_order_key, least_us, '+inf')) }
    local first, seen = below_us == '+inf' and 0 or rank_behind(task_order_key, tonumber(below_us), below_id), 0
    local least = tonumber(least_us)
    while true do
      local page = call('ZREVRANGE', task_order_key, first, first + PAGE - 1, 'WITHSCORES')
      local ids = {}
      for i = 1, #page, 2 do
        ids[#ids + 1] = page[i]
      end
      local facts = #ids > 0 and call('HMGET', task_facts_key, unpack(ids)) or {}
      for i, id in ipairs(ids) do
        local time_us = tonumber(page[2 * i])
        if time_us < least then
          return ff.ok(unpack(found))
        end
        local its_state, its_context = string.match(facts[i] or '', '^%d+ (%S*) (%S*)$')
        seen = seen + 1
        if its_state and (state == '' or state == its_state) and (context == '' or context == its_context) then
          found[#found + 1] = id
          found[#found + 1] = string.format('%.0f', time_us)
        end
        if #found - 3 >= 2 * most or seen >= SCAN_LIMIT then
          found[1], found[2] = string.format('%.0f', time_us), id
          return ff.ok(unpack(found))
        end
      end
      if #ids < PAGE then
        return ff.ok(unpack(found))
      end
      first = first + PAGE
    end
  end,
  flags = { 'no-writes' },
})
