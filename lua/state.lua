-- The one state of an execution, the table of its transitions, and the one place that changes it: state, index,
-- timers, end entry and completion record together.
--
-- A call about an execution is given its core key. Every other key of the execution and of its partition shares the
-- slot, so it is spelled from the core key.

-- From a state to the states that may follow it.
ff.TRANSITIONS = {
  waiting = { active = true, failed = true, cancelled = true, expired = true },
  delayed = { waiting = true, cancelled = true, expired = true },
  waiting_children = { waiting = true, cancelled = true, expired = true },
  active = {
    waiting = true, delayed = true, waiting_children = true, suspended = true,
    completed = true, failed = true, cancelled = true, expired = true,
  },
  suspended = { waiting = true, failed = true, cancelled = true, expired = true },
  completed = {},
  failed = {},
  cancelled = {},
  expired = {},
}

-- Terminal states: outcome in the completion, and reason of the stream's end.
ff.OUTCOMES = { completed = 'success', failed = 'failed', cancelled = 'cancelled', expired = 'expired' }
ff.END_REASONS = {
  completed = 'attempt_success', failed = 'attempt_failure', cancelled = 'attempt_cancelled', expired = 'expired',
}

-- Records of completions that a partition keeps, about: so many, and for a day. A record takes some 130 bytes, at most
-- 960, so 256 partitions of which each is full take 70 MB.
local COMPLETION_MAXLEN, COMPLETION_MS = '2000', 86400000

-- The states of an execution that has not ended, with their numbers in the index of open executions: a score is the
-- number times 10^13 and the time of creation in ms, so those in one state stand together, by age.
ff.OPEN_STATES = { waiting = 1, delayed = 2, waiting_children = 3, active = 4, suspended = 5 }
ff.STATE_SPAN = 10000000000000

-- Executions that a partition lists of each state in which they end without success, the newest ones, and how long
-- after the last of them. Those that completed are found among the completions.
local ENDED_BEYOND, ENDED_MS = '-2001', '86400000'

local KEYS, PUSH = ff.KEYS, ff.PUSH

-- Keys that expire together after the execution has ended. Most executions have none of the second list, and those of
-- the third exist only beside a waitpoint.
local EXECUTION_KEYS = { 'core', 'payload', 'result', 'history' }
local RARE_KEYS = { 'waitpoints', 'tags', 'usage', 'usage_dedup', 'usage_recent', 'children' }
local WAITPOINT_KEYS = {
  'tokens', 'signals', 'signals_buffered', 'signals_dedup', 'suspension', 'suspension_signals',
}
local ATTEMPT_KEYS = { 'stream', 'live', 'head', 'meta', 'attempt', 'summary' }

-- Eligible executions sort by priority (higher first), then by age. Exact: |score| < 2^53 up to priority 9000.
function ff.eligible_score(priority, created_ms)
  return ff.text(created_ms - priority * 1000000000000)
end

-- A lane, or required capabilities, as they stand in a key.
local function in_key(text)
  return (string.gsub(text, '[^%w%._~%-]', function(char)
    return string.format('%%%02X', string.byte(char))
  end))
end

-- An execution: the fields of its core, the parts of its keys, the time of the call, and the hints for its lane (and
-- its parent's lane).
function ff.execution_of(core_key, fields, now)
  local slot_tag, id = string.match(core_key, '^ff:exec:(%b{}):(.*):core$')
  return {
    core_key = core_key,
    slot_tag = slot_tag,
    id = id,
    fields = fields,
    state = fields.state,
    now = now,
    timers_key = ff.key('timers', slot_tag),
    hints = {},
    heads = {},
  }
end

-- The execution with this core; nil if it does not exist.
function ff.load(core_key, now)
  local fields = ff.hash(core_key)
  return fields and ff.execution_of(core_key, fields, now or ff.now_ms())
end

-- A key of the execution, by its name in ff.KEYS.
function ff.execution_key(execution, name)
  local parts = KEYS[name]
  return parts[1] .. execution.slot_tag .. parts[2] .. execution.id .. parts[3]
end

-- A key of one attempt, by its name in ff.KEYS.
function ff.attempt_key(execution, name, index)
  return ff.key(name, execution.slot_tag, execution.id .. ':' .. index)
end

-- Whether the execution is that of a named stream, which is in no lane: those who know its name produce it.
function ff.is_named(execution)
  return execution.fields.lane_id == ''
end

-- Executions of a lane that require the same capabilities wait in one set of their partition: a worker looks at no
-- execution that it may not have. Returns its key.
function ff.eligible_key(execution)
  local key = execution.eligible_key
  if not key then
    local lane, needs = in_key(execution.fields.lane_id), execution.fields.required_capabilities
    if needs ~= '' then
      lane = lane .. ':' .. in_key(needs)
    end
    key = ff.key('eligible', execution.slot_tag, lane)
    execution.eligible_key, execution.queue = key, lane
  end
  return key
end

local function needs_key(execution)
  return ff.key('needs', execution.slot_tag, in_key(execution.fields.lane_id))
end

-- Refuses the call where the indexes of an execution that waits are foreign data.
function ff.expect_index(execution)
  if ff.is_named(execution) then
    ff.core_number(execution, 'takeover_ms')
    return
  end
  ff.expect('eligible', ff.eligible_key(execution))
  if execution.fields.required_capabilities ~= '' then
    ff.expect('needs', needs_key(execution))
  end
end

-- The indexes for those who look at a deployment are echoes of what the cores say: foreign data there refuses nothing.

-- Lists an execution under its state, which is no end. `state` is that which it has from then on.
function ff.list_open(execution, state)
  local fields = execution.fields
  redis.pcall('ZADD', ff.key('listed', execution.slot_tag),
    ff.text(ff.OPEN_STATES[state] * ff.STATE_SPAN + fields.created_at), execution.id .. ' ' .. fields.lane_id)
end

-- Lists an execution under the state in which it has ended.
local function list_ended(execution)
  local state = execution.state
  local member = execution.id .. ' ' .. execution.fields.lane_id
  redis.pcall('ZREM', ff.key('listed', execution.slot_tag), member)
  if state ~= 'completed' then
    local key = ff.key('ended', execution.slot_tag, state)
    redis.pcall('ZADD', key, ff.text(execution.now), member)
    redis.pcall('ZREMRANGEBYRANK', key, '0', ENDED_BEYOND)
    redis.pcall('PEXPIRE', key, ENDED_MS)
  end
end

-- Lists the queue of an execution that waits: its lane and what it requires, as they stand in the key of the set.
local function list_queue(execution)
  redis.pcall('ZADD', ff.key('queues', execution.slot_tag), '0', execution.queue)
end

-- Takes an empty queue off the list of queues.
function ff.forget_queue(slot_tag, queue)
  redis.pcall('ZREM', ff.key('queues', slot_tag), queue)
end

-- When a named stream that waits for a producer ends without one.
function ff.takeover_until(execution)
  return execution.now + tonumber(execution.fields.takeover_ms)
end

-- Lets workers find an execution that waits, and adds the hint for its lane. That of a named stream stands in no index:
-- its timer ends it unless somebody takes it over.
function ff.enqueue(execution)
  local fields = execution.fields
  if ff.is_named(execution) then
    ff.set_timer(execution, 'lease', ff.takeover_until(execution))
    return
  end
  local needs = fields.required_capabilities
  local score = ff.eligible_score(tonumber(fields.priority), tonumber(fields.created_at))
  redis.call('ZADD', ff.eligible_key(execution), score, execution.id)
  list_queue(execution)
  if needs ~= '' then
    redis.call('SADD', needs_key(execution), needs)
  end
  ff.with_hints(execution.hints, { fields.lane_id, needs, score })
end

-- Undoes ff.enqueue for an execution that moves to another state. The timer of a named stream that is taken over is
-- that of its lease from then on.
local function dequeue(execution, to)
  if ff.is_named(execution) then
    if to ~= 'active' then
      ff.clear_timers(execution, 'lease')
    end
    return
  end
  local key, needs = ff.eligible_key(execution), execution.fields.required_capabilities
  redis.call('ZREM', key, execution.id)
  if not execution.others_wait and redis.call('EXISTS', key) == 0 then
    ff.forget_queue(execution.slot_tag, execution.queue)
    if needs ~= '' then
      redis.call('SREM', needs_key(execution), needs)
    end
  end
end

-- Sets fields of the core, in the table and on the server: `...` is name value name value.
function ff.set(execution, ...)
  local changes = { ... }
  redis.call('HSET', execution.core_key, unpack(changes))
  for i = 1, #changes, 2 do
    execution.fields[changes[i]] = changes[i + 1]
  end
end

-- Bytes of the message of a failure that its entry in the history keeps, and the record of the end.
local ATTEMPT_ERROR, COMPLETION_ERROR = 1024, 256

-- Says in the core why an attempt fails; the entry of its end in the history gets the beginning of that. `...` are
-- other fields of the core that change with it.
function ff.set_failure(execution, message, class, detail, ...)
  ff.set(execution, 'failure_reason', message, 'failure_class', class, 'failure_detail', detail or '', ...)
  execution.error, execution.error_class = message, class
end

-- What ended an execution, for its reader; '' after a success. A failure that was retried before says nothing about
-- the end of a suspension.
function ff.end_error(execution, reason)
  local state, fields = execution.state, execution.fields
  if state == 'completed' then
    return ''
  end
  if reason == 'suspension_timeout' then
    return reason
  end
  return (state == 'cancelled' and fields.cancellation_reason or fields.failure_reason) or ''
end

function ff.set_timer(execution, kind, due_ms)
  redis.call('ZADD', execution.timers_key, ff.text(due_ms), kind .. ':' .. execution.id)
end

-- Clears the timers of these kinds, set or not, by one command.
function ff.clear_timers(execution, ...)
  local members = { ... }
  for i, kind in ipairs(members) do
    members[i] = kind .. ':' .. execution.id
  end
  redis.call('ZREM', execution.timers_key, unpack(members))
end

-- Appends to the reply a lane, required capabilities and a score for each hint: such executions may wait for a worker.
function ff.with_hints(reply, hints)
  for _, hint in ipairs(hints) do
    reply[#reply + 1] = hint
  end
  return reply
end

-- Adds the end entry to a log, behind what somebody else may have put there: an entry at or after the place of the end
-- refuses it, and blocked readers would sleep on. The end keeps its sequence, in a millisecond after that entry. A log
-- that takes no entry at all, being full to the last id or of another type, stays without; meta has the end anyway.
-- `message` is the error of the attempt, or ''. Returns the id of the entry.
local function add_end(log_key, ms, sequence, reason, visible, message)
  local pcall, id = redis.pcall, string.format('%d-%d', ms, sequence)
  local fields = { 'end', reason, 'prev', visible }
  if message ~= '' then
    fields[5], fields[6] = 'error', message
  end
  local added = pcall('XADD', log_key, id, unpack(fields))
  if type(added) == 'table' and added.err then
    local info = pcall('XINFO', 'STREAM', log_key)
    for i = 1, #info, 2 do
      if info[i] == 'last-generated-id' then
        local last_ms = ff.integer(string.match(info[i + 1], '^%d+'))
        if last_ms then
          id = string.format('%d-%d', last_ms + 1, sequence)
          pcall('XADD', log_key, id, unpack(fields))
        end
      end
    end
  end
  return id
end

-- The head of one of the execution's attempts, as the call has read or left it; nil where it has none that is intact.
local function head_of(execution, index)
  local head = execution.heads[index]
  if not head then
    head = ff.parse_head(redis.call('GET', ff.attempt_key(execution, 'head', index)))
    execution.heads[index] = head
  end
  return head
end

-- An append checks its writer and no other part of the fence, so the writer goes with the lease.
local function close_writer(execution, index)
  local head = head_of(execution, index)
  if head and head.writer ~= ff.NO_WRITER then
    head.writer = ff.NO_WRITER
    ff.write_head(ff.attempt_key(execution, 'head', index), head)
  end
end

-- Ends the stream of an attempt: the canonical word in meta, its echo at the end of the log and on the channel of the
-- attempt, and the retention of every key of the attempt. An attempt that never wrote a frame, or was never claimed,
-- ends the same way. The end entry takes the sequence after the last frame. It has the beginning of the error of an
-- attempt that ends with one, and so has the push: that of the execution, which may end with it.
function ff.end_stream(execution, index, reason)
  local call = redis.call
  local slot_tag, attempt, now = execution.slot_tag, execution.id .. ':' .. index, execution.now
  local meta_key, head_key = ff.key('meta', slot_tag, attempt), ff.key('head', slot_tag, attempt)
  local meta = call('HMGET', meta_key, 'closed_at', 'visible_sequence')
  close_writer(execution, index)
  if meta[1] then
    return
  end
  local head = head_of(execution, index)
  local last_ms, sequence = string.match(head and head.last_id or '', '^(%d+)-(%d+)$')
  last_ms, sequence = ff.integer(last_ms), ff.integer(sequence)
  if not last_ms or not sequence then
    last_ms, sequence = now, 0
    head = {
      lease_expires_at = 0, cancel_requested = '0', writer = ff.NO_WRITER, last_id = ff.text(now) .. '-0',
    }
    execution.heads[index] = head
    ff.write_head(head_key, head)
  end
  call('HSET', meta_key, 'closed_at', ff.text(now), 'closed_reason', reason)
  local visible = meta[2] or ff.text(sequence)
  local message = ff.OUTCOMES[execution.state] and ff.end_error(execution, reason) or execution.error or ''
  message = string.sub(message, 1, ATTEMPT_ERROR)
  local id = add_end(
    ff.key('stream', slot_tag, attempt), math.max(now, last_ms), sequence + 1, reason, visible, message
  )
  ff.publish(head_key, PUSH.END .. id .. ' ' .. visible .. ' ' .. reason .. (message ~= '' and ' ' .. message or ''))
  local retention_ms = execution.fields.retention_ms
  for _, name in ipairs(ATTEMPT_KEYS) do
    call('PEXPIRE', ff.key(name, slot_tag, attempt), retention_ms)
  end
end

-- The attempt whose stream is open or comes next: readers of it are waiting.
local function open_attempt(execution)
  local state, fields = execution.state, execution.fields
  if state == 'active' or state == 'suspended' or fields.interrupted == '1' then
    return fields.current_attempt_index
  end
  return fields.total_attempt_count
end

-- Closes the open suspension, and with it its waitpoints. Pending waitpoints stay open for a later suspension of the
-- attempt.
function ff.close_suspension(execution, why)
  local key = ff.execution_key(execution, 'suspension')
  redis.call('HSET', key, 'closed_at', ff.text(execution.now), 'close_reason', why)
end

local FLOW_MS = 86400000

-- A flow without open members expires after a day, or with its last member where that is kept for longer.
function ff.expire_flow_later(slot_tag, flow_id, retention_ms)
  local ms = ff.text(math.max(FLOW_MS, tonumber(retention_ms) or 0))
  redis.call('PEXPIRE', ff.key('flow', slot_tag, flow_id), ms)
  redis.call('PEXPIRE', ff.key('flow_members', slot_tag, flow_id), ms)
end

-- The fate of a member that has not ended when its flow is cancelled:
--   'cancel'  the member is cancelled
--   'hold'    the member stays, and cannot be claimed
--   'run'     the member continues
-- `policy` is nil while the flow is open. An attempt that is with a worker, suspended, or waiting for a worker to
-- continue it counts as running, and continues unless all are cancelled. A member that its worker has delayed, or that
-- waits for children, does not count as running.
function ff.flow_verdict(policy, interrupted, state)
  if not policy then
    return 'run'
  end
  if policy == 'cancel_all' then
    return 'cancel'
  end
  if state == 'active' or state == 'suspended' or (state == 'waiting' and interrupted == '1') then
    return 'run'
  end
  return policy == 'cancel_pending' and 'cancel' or 'hold'
end

-- The same for an execution that is, or is about to be, in `state`; 'run' where it belongs to no flow.
function ff.flow_verdict_of(execution, state)
  local flow_id = execution.fields.flow_id
  if not flow_id then
    return 'run'
  end
  local flow = redis.call('HMGET', ff.key('flow', execution.slot_tag, flow_id), 'state', 'cancel_policy')
  if flow[1] == 'open' then
    return 'run'
  end
  -- Without the flow's key its policy is unknown, so its members are neither cancelled nor started.
  return ff.flow_verdict(flow[2] or 'flow_only', execution.fields.interrupted, state)
end

-- Takes an ended execution off the children of its parent. The last child wakes a parent that waits for its children.
-- A parent that its cancelled flow takes along gets a timer that cancels it, since its own parent may wait as well, and
-- so on. It is asked for as one that waits for its children, so it does not matter which of them is cancelled first.
local function wake_parent(execution)
  local parent = execution.parent
  if not parent then
    return
  end
  redis.call('SREM', parent.children_key, execution.id)
  if parent.state ~= 'waiting_children' or redis.call('SCARD', parent.children_key) > 0 then
    return
  end
  if ff.flow_verdict_of(parent, parent.state) == 'cancel' then
    ff.set(parent, 'cancellation_reason', 'flow cancelled')
    ff.set_timer(parent, 'cancel', execution.now)
  else
    ff.move(parent, 'waiting')
    ff.with_hints(execution.hints, parent.hints)
  end
end

-- The record of an ended execution, for subscribers of completions. It has no result: a subscriber reads that from the
-- execution, which keeps it for its retention. Ids continue behind the last one wherever the clock goes, as long as the
-- key exists; so it has no TTL, and a trim leaves it.
local function publish_completion(execution, reason)
  local fields, result = execution.fields, execution.result
  local record = {
    'execution_id', execution.id, 'outcome', ff.OUTCOMES[execution.state], 'namespace', fields.namespace,
    'produced_at_ms', ff.text(execution.now),
  }
  if fields.flow_id then
    record[#record + 1] = 'flow_id'
    record[#record + 1] = fields.flow_id
  end
  if result and #result > 0 then
    record[#record + 1] = 'payload_bytes'
    record[#record + 1] = ff.text(#result)
  end
  if execution.state ~= 'completed' then
    record[#record + 1] = 'error'
    record[#record + 1] = string.sub(ff.end_error(execution, reason), 1, COMPLETION_ERROR)
  end
  -- XADD trims by one bound; each has its turn.
  local bound, value = 'MAXLEN', COMPLETION_MAXLEN
  if execution.now % 2 == 0 then
    bound, value = 'MINID', ff.text(execution.now - COMPLETION_MS)
  end
  -- The state in core is the word that counts. A stream that somebody else has made unusable keeps no execution open.
  local completions_key = ff.key('completions', execution.slot_tag)
  redis.pcall('XADD', completions_key, bound, '~', value, '*', unpack(record))
  ff.publish(completions_key, PUSH.COMPLETED)
end

-- Takes an ended execution off the open members of its flow.
local function leave_flow(execution)
  local flow_id = execution.fields.flow_id
  if not flow_id then
    return
  end
  local open_key = ff.key('flow_open', execution.slot_tag, flow_id)
  redis.call('ZREM', open_key, execution.id)
  if redis.call('ZCARD', open_key) == 0 then
    ff.expire_flow_later(execution.slot_tag, flow_id, execution.fields.retention_ms)
  end
end

-- Gives every key of an ended execution its retention TTL; those of its attempts have theirs from ff.end_stream.
local function expire_keys(execution)
  local call = redis.call
  local retention_ms = execution.fields.retention_ms
  local function expire(names)
    for _, name in ipairs(names) do
      call('PEXPIRE', ff.execution_key(execution, name), retention_ms)
    end
  end
  expire(EXECUTION_KEYS)
  local rare = {}
  for i, name in ipairs(RARE_KEYS) do
    rare[i] = ff.execution_key(execution, name)
  end
  if call('EXISTS', unpack(rare)) > 0 then
    expire(RARE_KEYS)
    if call('EXISTS', rare[1]) == 1 then
      expire(WAITPOINT_KEYS)
    end
  end
end

-- Removes the keys of some attempts of an ended execution; `first` and `last` are their indexes.
function ff.remove_attempts(execution, first, last)
  for index = first, last do
    local names = {}
    for i, name in ipairs(ATTEMPT_KEYS) do
      names[i] = ff.attempt_key(execution, name, ff.text(index))
    end
    redis.call('UNLINK', unpack(names))
  end
end

-- Removes every other key of an ended execution, and what names it elsewhere in its slot.
function ff.remove_execution(execution)
  local call, flow_id = redis.call, execution.fields.flow_id
  local kinds = {}
  for kind in pairs(ff.TIMERS) do
    kinds[#kinds + 1] = kind
  end
  ff.clear_timers(execution, unpack(kinds))
  redis.pcall('ZREM', ff.key('ended', execution.slot_tag, execution.state),
    execution.id .. ' ' .. execution.fields.lane_id)
  if flow_id then
    call('SREM', ff.key('flow_members', execution.slot_tag, flow_id), execution.id)
  end
  for _, names in ipairs({ RARE_KEYS, WAITPOINT_KEYS, EXECUTION_KEYS }) do
    for _, name in ipairs(names) do
      call('UNLINK', ff.execution_key(execution, name))
    end
  end
end

-- The writes that come with a terminal state.
local function conclude(execution, attempt, reason)
  ff.end_stream(execution, attempt, reason)
  local following = execution.fields.total_attempt_count
  if following ~= attempt then
    -- Who waits for the next attempt learns that none comes.
    ff.publish(ff.attempt_key(execution, 'head', following), PUSH.CHANGED)
  end
  leave_flow(execution)
  list_ended(execution)
  publish_completion(execution, reason)
  expire_keys(execution)
  wake_parent(execution)
end

-- A number among the fields of a core. Anything else refuses the call.
function ff.core_number(execution, name)
  return ff.integer(execution.fields[name]) or ff.corrupt('core')
end

local NOTHING = {}

-- What check_move asks of any execution: the keys and fields that each transition needs.
local function check_execution(execution, known)
  local fields = execution.fields
  local attempt = ff.TRANSITIONS[execution.state] and open_attempt(execution)
  local retention_ms, priority, created_at = fields.retention_ms, fields.priority, fields.created_at
  -- One match for all numbers: each alone would cost as much as a key.
  if
    not (attempt and retention_ms and priority and created_at and fields.lane_id and fields.required_capabilities)
    or #retention_ms > 16 or #priority > 16 or #created_at > 16 or #attempt > 16
    or not string.find(retention_ms .. ' ' .. priority .. ' ' .. created_at .. ' ' .. attempt, '^%d+ %d+ %d+ %d+$')
  then
    ff.corrupt('core')
  end
  if not known.timers then
    ff.expect('timers', execution.timers_key)
  end
  if not known.eligible then
    ff.expect_index(execution)
  end
  if not known.leases then
    ff.expect('leases', ff.key('leases', execution.slot_tag))
  end
  if not known.head then
    ff.expect('head', ff.attempt_key(execution, 'head', attempt))
  end
  if not known.meta then
    ff.expect('meta', ff.attempt_key(execution, 'meta', attempt))
  end
  local flow_id = fields.flow_id
  if flow_id then
    ff.expect('flow', ff.key('flow', execution.slot_tag, flow_id))
    ff.expect('flow_open', ff.key('flow_open', execution.slot_tag, flow_id))
    -- In a cancelled flow an attempt that is lost is followed by the end of the execution, and of the next stream.
    local following = ff.core_number(execution, 'total_attempt_count')
    ff.expect('head', ff.attempt_key(execution, 'head', following))
    ff.expect('meta', ff.attempt_key(execution, 'meta', following))
  end
end

-- Refuses the call where ff.move would meet foreign data behind its first write: keys of another type, and fields of
-- the core that are no numbers. Called before the first write of every call that may move the execution.
--
-- Foreign data in the execution's own streams, the log and the history, and in the stream of completions refuses
-- nothing: these are echoes of what core and meta say, and an execution must be able to end. Nor does foreign data in
-- the keys of its parent: such a parent is not woken.
--
-- `known` names keys that are not asked for, as a set: `timers`, `eligible` (with `needs`), `leases`, `head`, `meta`.
-- The call has read them, or its move does not touch them, or its first write is to one, and fails before any change.
function ff.check_move(execution, known)
  local slot_tag, parent_id = execution.slot_tag, execution.fields.parent_id
  check_execution(execution, known or NOTHING)
  if execution.state == 'suspended' then
    ff.expect('suspension', ff.execution_key(execution, 'suspension'))
    ff.expect('waitpoint_use', ff.key('waitpoint_use', slot_tag))
  end
  if parent_id then
    local children_key = ff.key('children', slot_tag, parent_id)
    local intact, parent = ff.guarded(function()
      ff.expect('children', children_key)
      local found = ff.load(ff.key('core', slot_tag, parent_id), execution.now)
      if found and found.state == 'waiting_children' then
        check_execution(found, NOTHING)
      end
      return found or { state = '' }
    end)
    if intact then
      parent.children_key = children_key
      execution.parent = parent
    end
  end
end

-- Tells the worker that holds an active execution to stop, on the channel of the leases of its partition. `what` is
-- 'cancel' where it is asked to, and 'lost' where its attempt is taken from it. A renewal tells it the same later.
function ff.tell_holder(execution, what)
  local parts = ff.CHANNELS.leases
  ff.publish(parts[1] .. execution.slot_tag .. parts[2],
    what .. ' ' .. execution.id .. ' ' .. execution.fields.current_attempt_index)
end

-- The timers that an execution leaves behind with a state, and those that it leaves with its last one.
local LEAVING_TIMERS = { delayed = { 'delay' }, active = { 'lease', 'attempt' }, suspended = { 'suspension' } }
local ENDING_TIMERS = {
  waiting = { 'deadline', 'cancel' }, delayed = { 'delay', 'deadline', 'cancel' },
  waiting_children = { 'deadline', 'cancel' }, active = { 'lease', 'attempt', 'deadline', 'cancel' },
  suspended = { 'suspension', 'deadline', 'cancel' },
}

-- Moves an execution to another state. Every caller has checked its arguments before, and has called ff.check_move; a
-- transition that the table does not know is a bug of the caller. `reason` says why the stream of the attempt ends,
-- where it does; nil else. `...` are fields of the core that change with the state: name value name value.
function ff.move(execution, to, reason, ...)
  local call = redis.call
  local from, fields, outcome = execution.state, execution.fields, ff.OUTCOMES[to]
  if not (ff.TRANSITIONS[from] and ff.TRANSITIONS[from][to]) then
    error('ff_fast: no transition from ' .. from .. ' to ' .. to)
  end
  local attempt = open_attempt(execution)
  local timers = (outcome and ENDING_TIMERS or LEAVING_TIMERS)[from]
  if timers then
    ff.clear_timers(execution, unpack(timers))
  end
  if from == 'waiting' then
    dequeue(execution, to)
  elseif from == 'active' then
    if not outcome then
      -- The end of the stream closes it else.
      close_writer(execution, attempt)
    end
    call('HDEL', ff.key('leases', execution.slot_tag), fields.current_lease_digest or '')
  elseif from == 'suspended' then
    ff.count_suspended(execution, -1)
    if to ~= 'waiting' then
      ff.close_suspension(execution, to)
    end
  end
  if to == 'suspended' then
    ff.count_suspended(execution, 1)
  end
  execution.state = to
  local now = ff.text(execution.now)
  if outcome then
    ff.set(execution, 'state', to, 'last_transition_at', now, 'completed_at', now, 'outcome', outcome, ...)
  else
    ff.set(execution, 'state', to, 'last_transition_at', now, ...)
  end
  local history_key, message = ff.execution_key(execution, 'history'), execution.error
  if to == 'cancelled' then
    message = fields.cancellation_reason
  end
  if message then
    redis.pcall('XADD', history_key, 'MAXLEN', '~', '1000', '*', 'from', from, 'to', to, 'attempt', attempt,
      'reason', reason or '', 'error', string.sub(message, 1, ATTEMPT_ERROR), 'class', execution.error_class or '')
    execution.error, execution.error_class = nil, nil
  else
    redis.pcall('XADD', history_key, 'MAXLEN', '~', '1000', '*', 'from', from, 'to', to, 'attempt', attempt,
      'reason', reason or '')
  end
  ff.publish(execution.core_key, PUSH.STATE .. to)
  if to == 'active' or (from == 'active' and not outcome) then
    -- A lease begins, or no longer ends.
    ff.publish(ff.attempt_key(execution, 'head', attempt), PUSH.CHANGED)
  end
  if ff.OPEN_STATES[to] then
    ff.list_open(execution, to)
  end
  if to == 'waiting' then
    -- What a cancelled flow holds waits in no index: no worker will ever have it.
    local verdict = ff.flow_verdict_of(execution, to)
    if verdict == 'run' then
      ff.enqueue(execution)
    elseif verdict == 'cancel' then
      ff.set(execution, 'cancellation_reason', 'flow cancelled', 'cancelled_from', from)
      ff.move(execution, 'cancelled')
    end
  elseif outcome then
    conclude(execution, attempt, reason or ff.END_REASONS[to])
  end
  if from == 'active' and not execution.by_holder then
    ff.tell_holder(execution, 'lost')
  end
end

-- Ends the attempt without ending the execution: the next claim begins a new one.
function ff.end_attempt(execution, reason)
  ff.end_stream(execution, execution.fields.current_attempt_index, reason)
  ff.set(execution, 'interrupted', '')
end

-- Marks the attempt to be continued under a later lease. Its time limit stands still until then.
function ff.interrupt_attempt(execution)
  local due = redis.call('ZSCORE', execution.timers_key, 'attempt:' .. execution.id)
  local left = due and ff.text(math.max(tonumber(due) - execution.now, 1)) or ''
  ff.set(execution, 'interrupted', '1', 'attempt_left_ms', left)
end

-- Why a lease that is not the current one is refused. Each grant has the next epoch, and the caller's was granted here.
-- So an epoch before the caller's means that this server has lost the claim.
function ff.lost_ownership(epoch, current_epoch)
  if (tonumber(current_epoch) or 0) < (tonumber(epoch) or 0) then
    return ff.err('state_lost')
  end
  return ff.err('stale_owner')
end

-- The execution of a call that needs a live lease. `lease`, the caller's fence, is kept with it for ff.save_reply;
-- `by_holder` says that ff.move needs to tell no holder.
-- Returns the execution, or nil, the refusal, and the execution where there is one.
function ff.load_owned(core_key, attempt_index, lease_id, lease_epoch)
  local execution = ff.load(core_key)
  if not execution then
    return nil, ff.err('execution_not_found')
  end
  local lease_digest = ff.lease_digest(lease_id)
  execution.lease = attempt_index .. ' ' .. lease_digest .. ' ' .. lease_epoch
  execution.by_holder = true
  local fields = execution.fields
  if
    fields.current_attempt_index ~= attempt_index or fields.current_lease_digest ~= lease_digest
    or fields.current_lease_epoch ~= lease_epoch
  then
    return nil, ff.lost_ownership(lease_epoch, fields.current_lease_epoch), execution
  end
  if execution.state == 'suspended' then
    return nil, ff.err('suspended'), execution
  end
  if execution.state ~= 'active' then
    return nil, ff.err('execution_not_active', execution.state, fields.outcome or ''), execution
  end
  if ff.lease_expires_at(execution) <= execution.now then
    return nil, ff.err('lease_expired'), execution
  end
  return execution
end

-- The fields of the core that keep the answer of the call that releases the lease, as words; a repeat of the call under
-- this lease gets it again.
function ff.reply_fields(execution, ...)
  return 'released_lease', execution.lease, 'released_as', table.concat({ ... }, ' ')
end

function ff.save_reply(execution, ...)
  ff.set(execution, ff.reply_fields(execution, ...))
end

-- The words that were saved under the lease of the call; nil where this lease was not released.
local function saved_reply(execution)
  if execution.fields.released_lease ~= execution.lease then
    return nil
  end
  local words = {}
  for word in string.gmatch(execution.fields.released_as, '%S+') do
    words[#words + 1] = word
  end
  return words
end

-- Entries of other programs among which the next one of ours is looked for.
local NEIGHBOURS = 4

-- The entry of ours that stands next to an id, among the first few; nil where there is none. An entry that another
-- program wrote says nothing about places.
local function neighbour(entries)
  for _, entry in ipairs(entries) do
    local frames = 1
    for i = 1, #entry[2], 2 do
      local name = entry[2][i]
      if name == 'run' then
        frames = ff.run_count(entry[2][i + 1])
      elseif name == 'lost' then
        frames = ff.integer(entry[2][i + 1]) or 1
      end
      if name == 'payload' or name == 'run' or name == 'end' or name == 'lost' then
        local ms, last = ff.split_id(entry[1])
        return { id = entry[1], ms = ms, first = last - frames + 1, last = last, lost = name == 'lost' }
      end
    end
  end
end

-- Looks for the frame with the id `cursor` in an attempt that began at `created_at`. Returns '' where it is stored, or
-- was and has left, or is one that a loss stands for, or would stand before the next frame. Else the stream is not the
-- one in which the cursor was taken: returns the id of the last frame before that place, or '0-0' where ids say nothing
-- about their order.
function ff.other_place(log_key, live_key, cursor, created_at)
  local call = redis.call
  local ms, sequence = ff.split_id(cursor)
  if not ms or tonumber(ms) == 0 then
    return ''
  end
  local other = created_at and tonumber(ms) < (tonumber(created_at) or 0)
  local before, restart = '0-0', other
  local before_ms, before_last = 0, 0
  for _, key in ipairs({ log_key, live_key }) do
    local following = neighbour(call('XRANGE', key, cursor, '+', 'COUNT', NEIGHBOURS))
    if following and following.ms == ms and following.first <= sequence + 1 then
      return ''
    end
    -- A loss stands for frames of earlier times than its own.
    if following and following.lost and following.first <= sequence + 1 and following.last >= sequence then
      return ''
    end
    other = other or (following and following.first <= sequence)
    local preceding = neighbour(call('XREVRANGE', key, '(' .. cursor, '-', 'COUNT', NEIGHBOURS))
    if preceding then
      restart = restart or preceding.last >= sequence
      local its_ms = tonumber(preceding.ms)
      if its_ms > before_ms or (its_ms == before_ms and preceding.last > before_last) then
        before, before_ms, before_last = preceding.id, its_ms, preceding.last
      end
    end
  end
  if restart then
    return '0-0'
  end
  return other and before or ''
end

-- The refusal where an attempt has lost the frame `known`, which its caller knows to be stored: its stream is shorter,
-- or has other frames there; nil where nothing is lost. `known` is an id, '' for none; time 0 is any time. `last_id`
-- is that of the attempt's head, nil where it has none.
function ff.lost_frames(slot_tag, attempt, last_id, known)
  if known == '' or known == last_id then
    return nil
  end
  local ms, sequence = ff.split_id(known)
  if not ms then
    return ff.err('invalid_input', 'last_id')
  end
  local _, stored = ff.split_id(last_id or '0-0')
  if stored < sequence then
    return ff.err('sequence_gap', ff.text(stored + 1), ff.text(sequence + 1))
  end
  local log_key, live_key = ff.key('stream', slot_tag, attempt), ff.key('live', slot_tag, attempt)
  local other = stored == sequence and tonumber(ms) > 0
  if sequence > 0 and not other then
    local created_at = redis.call('HGET', ff.key('meta', slot_tag, attempt), 'created_at')
    other = ff.other_place(log_key, live_key, known, created_at) ~= ''
  end
  if sequence > 0 and other then
    return ff.err('sequence_gap', ff.text(sequence), ff.text(sequence + 1))
  end
  return nil
end

-- The owned execution of a call that releases the lease; or nil and the reply. The reply is the saved one where a call
-- of the same kind has released this lease, and the refusal else. `known` is the last frame that the caller knows to be
-- stored; without it nothing is said about the stream.
function ff.load_releasable(core_key, attempt_index, lease_id, lease_epoch, kind, known)
  local execution, refusal, found = ff.load_owned(core_key, attempt_index, lease_id, lease_epoch)
  if execution then
    local attempt = execution.id .. ':' .. attempt_index
    local lost = ff.lost_frames(execution.slot_tag, attempt, execution.heads[attempt_index].last_id, known or '')
    if lost then
      return nil, lost
    end
    -- The end of the lease was read from the head. What is completed waits for no worker; a parent may.
    ff.check_move(execution, { head = true, eligible = kind == 'completed' and not execution.fields.parent_id })
    return execution
  end
  local words = found and saved_reply(found)
  if words and words[1] == kind then
    return nil, ff.ok(unpack(words))
  end
  return nil, refusal
end

-- When the lease ends, which the head of the attempt says. The head is kept with the execution.
function ff.lease_expires_at(execution)
  local index = execution.fields.current_attempt_index
  local head = index and ff.read_head(ff.attempt_key(execution, 'head', index))
  if not head then
    return 0
  end
  execution.heads[index] = head
  return head.lease_expires_at
end
