-- The one state of an execution, the table of its transitions, and the one place that changes it: state, index,
-- timers, end entry and completion record together.
--
-- A call that begins at an execution is told its core key. The other keys of the execution and of its partition
-- share the slot and are spelled here from it, as ff_fast/keys.py spells them.

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

-- Terminal states: what the completion says, and why the stream ends.
ff.OUTCOMES = { completed = 'success', failed = 'failed', cancelled = 'cancelled', expired = 'expired' }
ff.END_REASONS = {
  completed = 'attempt_success', failed = 'attempt_failure', cancelled = 'attempt_cancelled', expired = 'expired',
}

-- A larger result is not repeated in the completion record; a subscriber reads it from the execution.
local COMPLETION_PAYLOAD = 65536
local COMPLETION_MAXLEN = '10000'

-- Eligible executions sort by priority (higher first), then by age. Exact: |score| < 2^53 up to priority 9000.
function ff.eligible_score(priority, created_ms)
  return ff.text(created_ms - priority * 1000000000000)
end

-- A lane as it stands in a key.
local function lane_in_key(lane)
  return (string.gsub(lane, '[^%w%._~%-]', function(char)
    return string.format('%%%02X', string.byte(char))
  end))
end

-- An execution as these functions see it: the fields of its core, its keys, the time of the call, and the hints that
-- its lane (and its parent's) must get. nil where there is none.
function ff.load(core_key, now)
  local flat = redis.call('HGETALL', core_key)
  if #flat == 0 then
    return nil
  end
  local fields = {}
  for i = 1, #flat, 2 do
    fields[flat[i]] = flat[i + 1]
  end
  local tag, id = string.match(core_key, '^ff:exec:(%b{}):(.*):core$')
  return {
    core = core_key,
    prefix = 'ff:exec:' .. tag .. ':' .. id .. ':',
    tag = tag,
    id = id,
    fields = fields,
    state = fields.state,
    now = now or ff.now_ms(),
    timers = 'ff:idx:' .. tag .. ':timers',
    hints = {},
  }
end

function ff.eligible_key(x)
  return 'ff:idx:' .. x.tag .. ':lane:' .. lane_in_key(x.fields.lane_id) .. ':eligible'
end

-- Keys of one attempt.
function ff.attempt_keys(x, index)
  local stream = 'ff:stream:' .. x.tag .. ':' .. x.id .. ':' .. index
  local attempt = 'ff:attempt:' .. x.tag .. ':' .. x.id .. ':' .. index
  return {
    log = stream,
    live = stream .. ':live',
    meta = stream .. ':meta',
    attempt = attempt,
    summary = attempt .. ':summary',
  }
end

-- Sets fields of the core, here and on the server.
function ff.set(x, ...)
  local pairs_ = { ... }
  redis.call('HSET', x.core, unpack(pairs_))
  for i = 1, #pairs_, 2 do
    x.fields[pairs_[i]] = pairs_[i + 1]
  end
end

function ff.set_timer(x, kind, due_ms)
  redis.call('ZADD', x.timers, ff.text(due_ms), kind .. ':' .. x.id)
end

function ff.clear_timer(x, kind)
  redis.call('ZREM', x.timers, kind .. ':' .. x.id)
end

-- The reply of a call after which executions may be waiting: `...`, then a lane and a score for each hint.
function ff.ok_with_hints(x, ...)
  local reply = ff.ok(...)
  for _, hint in ipairs(x.hints) do
    reply[#reply + 1] = hint
  end
  return reply
end

-- Ends the stream of an attempt: the canonical word in meta, its echo at the end of the log (which wakes every
-- blocked reader), and the retention of every key of the attempt. An attempt that never wrote a frame, or was never
-- claimed, ends the same way. The end entry takes the sequence after the last frame.
function ff.end_stream(x, index, reason)
  local call = redis.call
  local keys = ff.attempt_keys(x, index)
  local meta = call('HMGET', keys.meta, 'last_id', 'closed_at', 'visible_sequence')
  if meta[2] then
    return
  end
  local last_id = meta[1] or ff.text(x.now) .. '-0'
  local last_ms, sequence = ff.split_id(last_id)
  local ms = math.max(x.now, tonumber(last_ms))
  call('HDEL', keys.meta, 'writer')
  call('HSET', keys.meta, 'closed_at', ff.text(x.now), 'closed_reason', reason,
    'last_id', last_id)
  call('XADD', keys.log, string.format('%d-%d', ms, sequence + 1), 'end', reason,
    'prev', meta[3] or ff.text(sequence))
  for _, key in pairs(keys) do
    call('PEXPIRE', key, x.fields.retention_ms)
  end
end

-- The attempt whose stream is open or comes next: readers of it are waiting.
local function open_attempt(x)
  if x.state == 'active' or x.state == 'suspended' or x.fields.interrupted == '1' then
    return x.fields.current_attempt_index
  end
  return x.fields.total_attempt_count
end

-- Closes the suspension that is open, with the waitpoints that it names: none of their tokens resumes anything from
-- here on. A waitpoint that is pending goes on waiting for its suspension.
function ff.close_suspension(x, why)
  local call = redis.call
  local key = x.prefix .. 'suspension:current'
  local suspension = call('HMGET', key, 'suspension_id', 'closed_at', 'leaf_count')
  if not suspension[1] or suspension[2] then
    return
  end
  call('HSET', key, 'closed_at', ff.text(x.now), 'close_reason', why)
  for j = 0, tonumber(suspension[3]) - 1 do
    ff.close_waitpoint(x, string.match(call('HGET', key, 'leaf:' .. j), '^%d+ (%S+)'), why)
  end
end

-- Closes every waitpoint of the attempt that ends, and its suspension.
local function close_waitpoints(x, why)
  ff.close_suspension(x, why)
  for _, waitpoint in ipairs(redis.call('SMEMBERS', x.prefix .. 'waitpoints')) do
    ff.close_waitpoint(x, waitpoint, why)
  end
end

function ff.close_waitpoint(x, waitpoint, why)
  local key = 'ff:wp:' .. x.tag .. ':' .. waitpoint
  local state = redis.call('HGET', key, 'state')
  if state == 'pending' or state == 'active' then
    redis.call('HSET', key, 'state', 'closed', 'closed_at', ff.text(x.now), 'close_reason', why)
    redis.call('ZREM', x.timers, 'waitpoint:' .. x.id .. ':' .. waitpoint)
  end
end

-- A child of a parent that waits for its children: the last one wakes it.
local function wake_parent(x)
  local parent_id = x.fields.parent_id
  if not parent_id then
    return
  end
  local parent_prefix = 'ff:exec:' .. x.tag .. ':' .. parent_id .. ':'
  redis.call('SREM', parent_prefix .. 'children', x.id)
  local parent = ff.load(parent_prefix .. 'core', x.now)
  if parent and parent.state == 'waiting_children' and redis.call('SCARD', parent_prefix .. 'children') == 0 then
    ff.move(parent, 'waiting')
    for _, hint in ipairs(parent.hints) do
      x.hints[#x.hints + 1] = hint
    end
  end
end

local FLOW_MS = 86400000

-- A flow without open members goes after a day, or with its last member where that is kept for longer.
function ff.let_flow_go(flow_key, retention_ms)
  local ms = ff.text(math.max(FLOW_MS, tonumber(retention_ms) or 0))
  redis.call('PEXPIRE', flow_key, ms)
  redis.call('PEXPIRE', flow_key .. ':members', ms)
end

-- What comes with a terminal state.
local function conclude(x, attempt, reason)
  local call = redis.call
  local fields, retention_ms = x.fields, x.fields.retention_ms
  ff.end_stream(x, attempt, reason)
  ff.clear_timer(x, 'deadline')
  ff.clear_timer(x, 'cancel')
  close_waitpoints(x, x.state)
  ff.set(x, 'completed_at', ff.text(x.now), 'outcome', ff.OUTCOMES[x.state])
  local record = {
    'execution_id', x.id, 'outcome', ff.OUTCOMES[x.state], 'namespace', fields.namespace,
    'produced_at_ms', ff.text(x.now),
  }
  if fields.flow_id then
    record[#record + 1] = 'flow_id'
    record[#record + 1] = fields.flow_id
    local flow_key = 'ff:flow:' .. x.tag .. ':' .. fields.flow_id
    call('SREM', flow_key .. ':open', x.id)
    if call('SCARD', flow_key .. ':open') == 0 then
      ff.let_flow_go(flow_key, retention_ms)
    end
  end
  if x.result and #x.result > 0 then
    record[#record + 1] = 'payload_bytes'
    record[#record + 1] = ff.text(#x.result)
    if #x.result <= COMPLETION_PAYLOAD then
      record[#record + 1] = 'payload'
      record[#record + 1] = x.result
    end
  end
  local completions = 'ff:part:' .. x.tag .. ':completions'
  call('XADD', completions, 'MAXLEN', '~', COMPLETION_MAXLEN, '*', unpack(record))
  for _, waitpoint in ipairs(call('SMEMBERS', x.prefix .. 'waitpoints')) do
    call('PEXPIRE', 'ff:wp:' .. x.tag .. ':' .. waitpoint, retention_ms)
  end
  for _, signal in ipairs(call('LRANGE', x.prefix .. 'signals', 0, -1)) do
    call('PEXPIRE', 'ff:signal:' .. x.tag .. ':' .. signal, retention_ms)
  end
  for _, name in ipairs({
    'core', 'payload', 'result', 'tags', 'usage', 'usage:dedup', 'waitpoints', 'tokens', 'signals',
    'signals:buffered', 'signals:dedup', 'suspension:current', 'suspension:signals', 'children', 'history',
  }) do
    call('PEXPIRE', x.prefix .. name, retention_ms)
  end
  wake_parent(x)
end

-- Whether the flow of an execution that is about to wait for a worker is cancelled, and with it what does not run. An
-- attempt that has begun may go on, unless all are cancelled.
function ff.flow_ends(x)
  if not x.fields.flow_id then
    return false
  end
  local flow = redis.call('HMGET', 'ff:flow:' .. x.tag .. ':' .. x.fields.flow_id, 'state', 'cancel_policy')
  return flow[1] == 'cancelled'
    and (flow[2] == 'cancel_all' or (flow[2] == 'cancel_pending' and x.fields.interrupted ~= '1'))
end

-- Moves an execution to another state. Every caller has checked its arguments before; a transition that the table does
-- not know is a bug of the caller. `reason` says why the stream of the attempt ends, where it does.
function ff.move(x, to, reason)
  local call = redis.call
  local from = x.state
  if not (ff.TRANSITIONS[from] and ff.TRANSITIONS[from][to]) then
    error('ff_fast: no transition from ' .. from .. ' to ' .. to)
  end
  local attempt = open_attempt(x)
  if from == 'waiting' then
    call('ZREM', ff.eligible_key(x), x.id)
  elseif from == 'delayed' then
    ff.clear_timer(x, 'delay')
  elseif from == 'active' then
    ff.clear_timer(x, 'lease')
    ff.clear_timer(x, 'attempt')
    -- Whatever takes the lease away takes the writer away: an append asks for nothing else.
    call('HDEL', ff.attempt_keys(x, attempt).meta, 'writer')
  elseif from == 'suspended' then
    ff.clear_timer(x, 'suspension')
  end
  x.state = to
  ff.set(x, 'state', to, 'last_transition_at', ff.text(x.now))
  call('XADD', x.prefix .. 'history', 'MAXLEN', '~', '1000', '*', 'from', from, 'to', to, 'attempt', attempt,
    'reason', reason or '')
  if to == 'waiting' and ff.flow_ends(x) then
    -- Nobody could claim it any more.
    ff.set(x, 'cancellation_reason', 'flow cancelled', 'cancelled_from', from)
    ff.move(x, 'cancelled')
  elseif to == 'waiting' then
    local score = ff.eligible_score(tonumber(x.fields.priority), tonumber(x.fields.created_at))
    call('ZADD', ff.eligible_key(x), score, x.id)
    x.hints[#x.hints + 1] = x.fields.lane_id
    x.hints[#x.hints + 1] = score
  elseif ff.OUTCOMES[to] then
    conclude(x, attempt, reason or ff.END_REASONS[to])
  end
end

-- Ends the attempt without ending the execution: the next claim makes a new one.
function ff.end_attempt(x, reason)
  ff.end_stream(x, x.fields.current_attempt_index, reason)
  close_waitpoints(x, reason)
  ff.set(x, 'interrupted', '')
end

-- The attempt goes on under a later lease: its time limit stands still until then.
function ff.interrupt_attempt(x)
  local due = redis.call('ZSCORE', x.timers, 'attempt:' .. x.id)
  ff.set(x, 'interrupted', '1', 'attempt_left_ms', due and ff.text(math.max(tonumber(due) - x.now, 1)) or '')
end

-- The lease of a fenced call, as the outcome of its first run is kept under.
local function lease_of(args)
  return args[1] .. ' ' .. args[2] .. ' ' .. args[3]
end

-- Remembers what the call that gave the lease up answered; `...` is the answer.
function ff.remember(x, args, ...)
  ff.set(x, 'released_lease', lease_of(args), 'released_as', table.concat({ ... }, ' '))
end

-- What the call that gave this lease up answered, as a list of words; nil where this lease was not given up.
function ff.remembered(x, args)
  if x.fields.released_lease ~= lease_of(args) then
    return nil
  end
  local words = {}
  for word in string.gmatch(x.fields.released_as, '%S+') do
    words[#words + 1] = word
  end
  return words
end

-- The execution of a call that needs a live lease (args 1 to 3: attempt index, lease id, lease epoch).
-- Returns it, or nil, the error reply, and the execution where there is one.
function ff.owned(core_key, args)
  local x = ff.load(core_key)
  if not x then
    return nil, ff.err('execution_not_found')
  end
  local fields = x.fields
  if
    fields.current_attempt_index ~= args[1] or fields.current_lease_id ~= args[2]
    or fields.current_lease_epoch ~= args[3]
  then
    return nil, ff.err('stale_owner'), x
  end
  if x.state == 'suspended' then
    return nil, ff.err('suspended'), x
  end
  if x.state ~= 'active' then
    return nil, ff.err('execution_not_active', x.state, fields.outcome or ''), x
  end
  if ff.lease_expires_at(x) <= x.now then
    return nil, ff.err('lease_expired'), x
  end
  return x
end

-- The lease ends at the time that its attempt's meta names; appends read it there.
function ff.lease_expires_at(x)
  local meta = ff.attempt_keys(x, x.fields.current_attempt_index).meta
  return tonumber(redis.call('HGET', meta, 'lease_expires_at') or '0') or 0
end
