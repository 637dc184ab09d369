-- The one state of an execution, the table of its transitions, and the one place that changes it: state, index,
-- timers, end entry and completion record together.
--
-- A call about an execution is given its core key. Every other key of the execution and of its partition shares the
-- slot, so it is spelled from the core key.

-- From a state to the states that may follow it.
ff.TRANSITIONS = {
  waiting = { active = true, cancelled = true, expired = true },
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
-- 700, so 256 partitions of which each is full take 70 MB.
local COMPLETION_MAXLEN, COMPLETION_MS = '2000', 86400000

local KEYS = ff.KEYS

-- Keys that expire together after the execution has ended.
local EXECUTION_KEYS = {
  'core', 'payload', 'result', 'tags', 'usage', 'usage_dedup', 'waitpoints', 'tokens', 'signals', 'signals_buffered',
  'signals_dedup', 'suspension', 'suspension_signals', 'children', 'history',
}
local ATTEMPT_KEYS = { 'stream', 'live', 'meta', 'attempt', 'summary' }

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

function ff.waitpoint_key(execution, waitpoint_id)
  return ff.key('waitpoint', execution.slot_tag, waitpoint_id)
end

-- `signal` is `<waitpoint id>:<signal id>`: a signal that goes to two waitpoints is stored twice.
function ff.signal_key(execution, signal)
  return ff.key('signal', execution.slot_tag, signal)
end

-- Executions of a lane that require the same capabilities wait in one set of their partition: a worker looks at no
-- execution that it may not have. Returns its key.
local function eligible_key(execution)
  local lane, needs = in_key(execution.fields.lane_id), execution.fields.required_capabilities
  if needs ~= '' then
    lane = lane .. ':' .. in_key(needs)
  end
  return ff.key('eligible', execution.slot_tag, lane)
end

local function needs_key(execution)
  return ff.key('needs', execution.slot_tag, in_key(execution.fields.lane_id))
end

-- Lets workers find an execution that waits, and adds the hint for its lane.
function ff.enqueue(execution)
  local fields = execution.fields
  local needs = fields.required_capabilities
  local score = ff.eligible_score(tonumber(fields.priority), tonumber(fields.created_at))
  redis.call('ZADD', eligible_key(execution), score, execution.id)
  if needs ~= '' then
    redis.call('SADD', needs_key(execution), needs)
  end
  ff.with_hints(execution.hints, { fields.lane_id, needs, score })
end

local function dequeue(execution)
  local key, needs = eligible_key(execution), execution.fields.required_capabilities
  redis.call('ZREM', key, execution.id)
  if needs ~= '' and redis.call('EXISTS', key) == 0 then
    redis.call('SREM', needs_key(execution), needs)
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

function ff.set_timer(execution, kind, due_ms)
  redis.call('ZADD', execution.timers_key, ff.text(due_ms), kind .. ':' .. execution.id)
end

function ff.clear_timer(execution, kind)
  redis.call('ZREM', execution.timers_key, kind .. ':' .. execution.id)
end

-- The timer of a pending waitpoint, as it stands in the timer set.
function ff.waitpoint_timer(execution, waitpoint_id)
  return 'waitpoint:' .. execution.id .. ':' .. waitpoint_id
end

-- Appends to the reply a lane, required capabilities and a score for each hint: such executions may wait for a worker.
function ff.with_hints(reply, hints)
  for _, hint in ipairs(hints) do
    reply[#reply + 1] = hint
  end
  return reply
end

-- Ends the stream of an attempt: the canonical word in meta, its echo at the end of the log (which wakes every blocked
-- reader), and the retention of every key of the attempt. An attempt that never wrote a frame, or was never claimed,
-- ends the same way. The end entry takes the sequence after the last frame.
function ff.end_stream(execution, index, reason)
  local call = redis.call
  local meta_key, now = ff.attempt_key(execution, 'meta', index), execution.now
  local meta = call('HMGET', meta_key, 'last_id', 'closed_at', 'visible_sequence')
  if meta[2] then
    return
  end
  local last_id = meta[1] or ff.text(now) .. '-0'
  local last_ms, sequence = ff.split_id(last_id)
  local ms = math.max(now, tonumber(last_ms))
  call('HDEL', meta_key, 'writer')
  call('HSET', meta_key, 'closed_at', ff.text(now), 'closed_reason', reason, 'last_id', last_id)
  call('XADD', ff.attempt_key(execution, 'stream', index), string.format('%d-%d', ms, sequence + 1), 'end', reason,
    'prev', meta[3] or ff.text(sequence))
  for _, name in ipairs(ATTEMPT_KEYS) do
    call('PEXPIRE', ff.attempt_key(execution, name, index), execution.fields.retention_ms)
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

-- Closes a waitpoint that is pending or active. Its token resumes nothing afterwards.
function ff.close_waitpoint(execution, waitpoint_id, why)
  local key = ff.waitpoint_key(execution, waitpoint_id)
  local state = redis.call('HGET', key, 'state')
  if state == 'pending' or state == 'active' then
    redis.call('HSET', key, 'state', 'closed', 'closed_at', ff.text(execution.now), 'close_reason', why)
    redis.call('ZREM', execution.timers_key, ff.waitpoint_timer(execution, waitpoint_id))
  end
end

-- Closes the open suspension and its waitpoints. Pending waitpoints stay open for a later suspension.
function ff.close_suspension(execution, why)
  local call = redis.call
  local key = ff.execution_key(execution, 'suspension')
  local suspension_id, closed_at, leaf_count = unpack(call('HMGET', key, 'suspension_id', 'closed_at', 'leaf_count'))
  if not suspension_id or closed_at then
    return
  end
  call('HSET', key, 'closed_at', ff.text(execution.now), 'close_reason', why)
  for j = 0, tonumber(leaf_count) - 1 do
    ff.close_waitpoint(execution, string.match(call('HGET', key, 'leaf:' .. j), '^%d+ (%S+)'), why)
  end
end

-- Closes every waitpoint of the attempt that ends, and its suspension.
local function close_waitpoints(execution, why)
  ff.close_suspension(execution, why)
  for _, waitpoint_id in ipairs(redis.call('SMEMBERS', ff.execution_key(execution, 'waitpoints'))) do
    ff.close_waitpoint(execution, waitpoint_id, why)
  end
end

-- Takes an ended execution off the children of its parent. The last child wakes a parent that waits for its children.
local function wake_parent(execution)
  local slot_tag, parent_id = execution.slot_tag, execution.fields.parent_id
  if not parent_id then
    return
  end
  local children_key = ff.key('children', slot_tag, parent_id)
  redis.call('SREM', children_key, execution.id)
  local parent = ff.load(ff.key('core', slot_tag, parent_id), execution.now)
  if parent and parent.state == 'waiting_children' and redis.call('SCARD', children_key) == 0 then
    ff.move(parent, 'waiting')
    ff.with_hints(execution.hints, parent.hints)
  end
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

-- The record of an ended execution, for subscribers of completions. It has no result: a subscriber reads that from the
-- execution, which keeps it for its retention. Ids continue behind the last one wherever the clock goes, as long as the
-- key exists; so it has no TTL, and a trim leaves it.
local function publish_completion(execution)
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
  -- XADD trims by one bound; each has its turn.
  local bound, value = 'MAXLEN', COMPLETION_MAXLEN
  if execution.now % 2 == 0 then
    bound, value = 'MINID', ff.text(execution.now - COMPLETION_MS)
  end
  local added = redis.pcall('XADD', ff.key('completions', execution.slot_tag), bound, '~', value, '*', unpack(record))
  -- A key of another type, or a foreign entry that has used up the ids, must not leave the execution half ended.
  if added.err and not string.find(added.err, 'WRONGTYPE') and not string.find(added.err, 'exhausted') then
    error(added)
  end
end

-- Takes an ended execution off the open members of its flow.
local function leave_flow(execution)
  local flow_id = execution.fields.flow_id
  if not flow_id then
    return
  end
  local open_key = ff.key('flow_open', execution.slot_tag, flow_id)
  redis.call('SREM', open_key, execution.id)
  if redis.call('SCARD', open_key) == 0 then
    ff.expire_flow_later(execution.slot_tag, flow_id, execution.fields.retention_ms)
  end
end

-- Gives every key of an ended execution its retention TTL; those of its attempts have theirs from ff.end_stream.
local function expire_keys(execution)
  local call = redis.call
  local retention_ms = execution.fields.retention_ms
  for _, waitpoint_id in ipairs(call('SMEMBERS', ff.execution_key(execution, 'waitpoints'))) do
    call('PEXPIRE', ff.waitpoint_key(execution, waitpoint_id), retention_ms)
  end
  for _, signal in ipairs(call('LRANGE', ff.execution_key(execution, 'signals'), 0, -1)) do
    call('PEXPIRE', ff.signal_key(execution, signal), retention_ms)
  end
  for _, name in ipairs(EXECUTION_KEYS) do
    call('PEXPIRE', ff.execution_key(execution, name), retention_ms)
  end
end

-- The writes that come with a terminal state.
local function conclude(execution, attempt, reason)
  ff.end_stream(execution, attempt, reason)
  ff.clear_timer(execution, 'deadline')
  ff.clear_timer(execution, 'cancel')
  close_waitpoints(execution, execution.state)
  ff.set(execution, 'completed_at', ff.text(execution.now), 'outcome', ff.OUTCOMES[execution.state])
  leave_flow(execution)
  publish_completion(execution)
  expire_keys(execution)
  wake_parent(execution)
end

-- Moves an execution to another state. Every caller has checked its arguments before; a transition that the table does
-- not know is a bug of the caller. `reason` says why the stream of the attempt ends, where it does.
function ff.move(execution, to, reason)
  local call = redis.call
  local from, fields = execution.state, execution.fields
  if not (ff.TRANSITIONS[from] and ff.TRANSITIONS[from][to]) then
    error('ff_fast: no transition from ' .. from .. ' to ' .. to)
  end
  local attempt = open_attempt(execution)
  if from == 'waiting' then
    dequeue(execution)
  elseif from == 'delayed' then
    ff.clear_timer(execution, 'delay')
  elseif from == 'active' then
    ff.clear_timer(execution, 'lease')
    ff.clear_timer(execution, 'attempt')
    -- An append checks its writer and no other part of the fence, so the writer goes with the lease.
    call('HDEL', ff.attempt_key(execution, 'meta', attempt), 'writer')
    call('HDEL', ff.key('leases', execution.slot_tag), fields.current_lease_digest or '')
  elseif from == 'suspended' then
    ff.clear_timer(execution, 'suspension')
  end
  execution.state = to
  ff.set(execution, 'state', to, 'last_transition_at', ff.text(execution.now))
  call('XADD', ff.execution_key(execution, 'history'), 'MAXLEN', '~', '1000', '*', 'from', from, 'to', to,
    'attempt', attempt, 'reason', reason or '')
  if to == 'waiting' then
    -- What a cancelled flow holds waits in no index: no worker will ever have it.
    local verdict = ff.flow_verdict_of(execution, to)
    if verdict == 'run' then
      ff.enqueue(execution)
    elseif verdict == 'cancel' then
      ff.set(execution, 'cancellation_reason', 'flow cancelled', 'cancelled_from', from)
      ff.move(execution, 'cancelled')
    end
  elseif ff.OUTCOMES[to] then
    conclude(execution, attempt, reason or ff.END_REASONS[to])
  end
end

-- Ends the attempt without ending the execution: the next claim begins a new one.
function ff.end_attempt(execution, reason)
  ff.end_stream(execution, execution.fields.current_attempt_index, reason)
  close_waitpoints(execution, reason)
  ff.set(execution, 'interrupted', '')
end

-- Marks the attempt to be continued under a later lease. Its time limit stands still until then.
function ff.interrupt_attempt(execution)
  local due = redis.call('ZSCORE', execution.timers_key, 'attempt:' .. execution.id)
  local left = due and ff.text(math.max(tonumber(due) - execution.now, 1)) or ''
  ff.set(execution, 'interrupted', '1', 'attempt_left_ms', left)
end

-- The execution of a call that needs a live lease. `lease`, the caller's fence, is kept with it for ff.save_reply.
-- Returns the execution, or nil, the refusal, and the execution where there is one.
function ff.load_owned(core_key, attempt_index, lease_id, lease_epoch)
  local execution = ff.load(core_key)
  if not execution then
    return nil, ff.err('execution_not_found')
  end
  local lease_digest = ff.lease_digest(lease_id)
  execution.lease = attempt_index .. ' ' .. lease_digest .. ' ' .. lease_epoch
  local fields = execution.fields
  if
    fields.current_attempt_index ~= attempt_index or fields.current_lease_digest ~= lease_digest
    or fields.current_lease_epoch ~= lease_epoch
  then
    return nil, ff.err('stale_owner'), execution
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

-- Saves the answer of the call that releases the lease, as words; a repeat of the call under this lease gets it again.
function ff.save_reply(execution, ...)
  ff.set(execution, 'released_lease', execution.lease, 'released_as', table.concat({ ... }, ' '))
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

-- The owned execution of a call that releases the lease; or nil and the reply. The reply is the saved one where a call
-- of the same kind has released this lease, and the refusal else.
function ff.load_releasable(core_key, attempt_index, lease_id, lease_epoch, kind)
  local execution, refusal, found = ff.load_owned(core_key, attempt_index, lease_id, lease_epoch)
  if execution then
    return execution
  end
  local words = found and saved_reply(found)
  if words and words[1] == kind then
    return nil, ff.ok(unpack(words))
  end
  return nil, refusal
end

-- The lease ends at the time that the meta hash of its attempt names; appends read it there.
function ff.lease_expires_at(execution)
  local meta_key = ff.attempt_key(execution, 'meta', execution.fields.current_attempt_index)
  return tonumber(redis.call('HGET', meta_key, 'lease_expires_at') or '0') or 0
end
