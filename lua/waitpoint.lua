-- Waitpoints, their tokens, suspension and signals.
--
-- A waitpoint belongs to one attempt. It is pending until a suspension names it, then active, then closed for good.
-- Its token is `<kid>:<HMAC-SHA1 hex>`, where kid is the id of a secret on the partition's ring. The digest covers
-- execution, waitpoint and creation time, each with its length before it. The newest secret signs; earlier ones
-- verify until their grace is over.

-- Most signals of one waitpoint; each is a key of its own.
local MAX_SIGNALS = 10000
local MAX_NODES, MAX_LEAVES = 256, 256

-- A kid has the form that ff_fast/keys.py calls an opaque id.
local function is_kid(text)
  return #text <= 64 and string.find(text, '^[%w_%-]+$') ~= nil
end

local function is_secret(text)
  return #text == 64 and not string.find(text, '[^0-9a-f]')
end

local function bytes_of(hex)
  return (string.gsub(hex, '%x%x', function(pair)
    return string.char(tonumber(pair, 16))
  end))
end

-- HMAC (RFC 2104, block of 64 bytes) with SHA-1, the only digest that the server offers to Lua. A secret has 64 hex
-- digits, so it is shorter than a block.
local function hmac_sha1(secret, message)
  local key = bytes_of(secret)
  local inner, outer = {}, {}
  for i = 1, 64 do
    local byte = string.byte(key, i) or 0
    inner[i] = string.char(bit.bxor(byte, 0x36))
    outer[i] = string.char(bit.bxor(byte, 0x5c))
  end
  return redis.sha1hex(table.concat(outer) .. bytes_of(redis.sha1hex(table.concat(inner) .. message)))
end

-- Compares two digests of 40 digits, in a time that does not depend on where they differ.
local function same_digest(a, b)
  local difference = 0
  for i = 1, 40 do
    difference = bit.bor(difference, bit.bxor(string.byte(a, i), string.byte(b, i)))
  end
  return difference == 0
end

local function token_message(execution_id, waitpoint_id, created_at)
  return table.concat({
    #execution_id, ':', execution_id, #waitpoint_id, ':', waitpoint_id, #created_at, ':', created_at,
  })
end

-- The kid and the secret that sign. An empty ring takes the caller's.
local function signing_secret(execution, kid, secret)
  local ring_key = ff.key('waitpoint_secrets', execution.slot_tag)
  local current = redis.call('HGET', ring_key, 'current_kid')
  if not current then
    redis.call('HSET', ring_key, 'current_kid', kid, 'secret:' .. kid, secret)
    return kid, secret
  end
  return current, redis.call('HGET', ring_key, 'secret:' .. current)
end

-- Whether `token` is the token of a waitpoint; `waitpoint` is its hash, or nil.
local function token_is_valid(execution, waitpoint_id, waitpoint, token)
  local kid, digest = string.match(token, '^([^:]+):(%x+)$')
  if not kid or #digest ~= 40 then
    return false
  end
  local ring_key = ff.key('waitpoint_secrets', execution.slot_tag)
  local current, secret, expires_at = unpack(
    redis.call('HMGET', ring_key, 'current_kid', 'secret:' .. kid, 'expires_at:' .. kid)
  )
  -- Every path computes a digest, so the time of a refusal does not tell which kids and waitpoints exist.
  local message = token_message(execution.id, waitpoint_id, waitpoint and waitpoint.created_at or '0')
  local expected = hmac_sha1(secret or string.rep('0', 64), message)
  local usable = secret and waitpoint and waitpoint.execution_id == execution.id
    and (kid == current or (expires_at and tonumber(expires_at) >= execution.now))
  return same_digest(expected, digest) and usable and true or false
end

-- Whether a waitpoint still takes signals for a suspension to come, by the server's clock.
local function is_pending(execution, waitpoint)
  return waitpoint.state == 'pending' and tonumber(waitpoint.expires_at) > execution.now
end

-- ff_rotate_waitpoint_secret
--   keys:    ring
--   args:    kid secret grace_ms
--   returns: previous_kid
--   errors:  rotation_conflict invalid_input
--
-- Tokens of the previous secret stay valid for the grace. The same kid with the same secret changes nothing.
redis.register_function('ff_rotate_waitpoint_secret', function(keys, args)
  local call = redis.call
  local ring_key = keys[1]
  local kid, secret, grace_ms = unpack(args, 1, 3)
  grace_ms = ff.integer(grace_ms)
  if not grace_ms or not is_kid(kid) or not is_secret(secret) then
    return ff.err('invalid_input', 'key')
  end
  local now = ff.now_ms()
  local current, known = unpack(call('HMGET', ring_key, 'current_kid', 'secret:' .. kid))
  if known and known ~= secret then
    return ff.err('rotation_conflict')
  end
  if current == kid then
    return ff.ok(current)
  end
  for _, field in ipairs(call('HKEYS', ring_key)) do
    local earlier = string.match(field, '^expires_at:(.*)$')
    if earlier and tonumber(call('HGET', ring_key, field)) < now then
      call('HDEL', ring_key, field, 'secret:' .. earlier)
    end
  end
  if current then
    call('HSET', ring_key, 'expires_at:' .. current, ff.text(now + grace_ms))
  end
  -- A secret that becomes current again has no end.
  call('HDEL', ring_key, 'expires_at:' .. kid)
  call('HSET', ring_key, 'current_kid', kid, 'secret:' .. kid, secret)
  return ff.ok(current or '')
end)

-- ff_create_waitpoint
--   keys:    core
--   args:    attempt_index lease_id lease_epoch waitpoint_id expires_ms kid secret
--   returns: token
--   errors:  execution_not_found stale_owner suspended execution_not_active lease_expired waitpoint_conflict
--            invalid_input
--
-- Repeating an id answers the same token. expires_ms is the longest time that it may stay pending. kid and secret
-- become the first key of an empty ring.
redis.register_function('ff_create_waitpoint', function(keys, args)
  local call = redis.call
  local core_key = keys[1]
  local attempt_index, lease_id, lease_epoch, waitpoint_id, expires_ms, kid, secret = unpack(args, 1, 7)
  expires_ms = ff.integer(expires_ms)
  if not expires_ms or expires_ms < 1 or not is_kid(kid) or not is_secret(secret) then
    return ff.err('invalid_input', 'waitpoint')
  end
  local execution, refusal = ff.load_owned(core_key, attempt_index, lease_id, lease_epoch)
  if not execution then
    return refusal
  end
  local key = ff.waitpoint_key(execution, waitpoint_id)
  local existing = ff.hash(key)
  if existing and (existing.execution_id ~= execution.id or existing.attempt_index ~= attempt_index) then
    return ff.err('waitpoint_conflict')
  end
  local created_at = existing and existing.created_at or ff.text(execution.now)
  local signing_kid, signing = signing_secret(execution, kid, secret)
  local token = signing_kid .. ':' .. hmac_sha1(signing, token_message(execution.id, waitpoint_id, created_at))
  if not existing then
    local expires_at = ff.text(execution.now + expires_ms)
    call('HSET', key, 'waitpoint_id', waitpoint_id, 'execution_id', execution.id, 'attempt_index', attempt_index,
      'state', 'pending', 'created_at', created_at, 'expires_at', expires_at)
    call('SADD', ff.execution_key(execution, 'waitpoints'), waitpoint_id)
    call('ZADD', execution.timers_key, expires_at, ff.waitpoint_timer(execution, waitpoint_id))
  end
  -- A condition names the waitpoint by its token.
  call('HSET', ff.execution_key(execution, 'tokens'), redis.sha1hex(token), waitpoint_id)
  return ff.ok(token)
end)

-- The suspension hash holds its condition as a tree in flat form.
--   node:<i>    parent needed distinct     node 0 is the root, parent -1
--   leaf:<j>    node waitpoint_id kind matcher
--   have:<i>:<what>   the signal that contributed; counted in got:<i>
-- A node is met when it has as many distinct contributions as it needs. Its rule of distinctness is `waitpoint`,
-- `signal`, `source`, or `leaf` (each leaf once). A met node contributes once to its parent.

local function matches(kind, matcher, signal)
  if kind == 'signal_name' then
    return signal.signal_name == matcher
  elseif kind == 'correlation_id' then
    return signal.correlation_id == matcher
  end
  return true
end

-- Gives one contribution to a node, and on to its parents. Returns whether it was new, and whether the root is met.
local function contribute(key, node, what, signal_id)
  local call = redis.call
  if call('HSETNX', key, 'have:' .. node .. ':' .. what, signal_id) == 0 then
    return false, false
  end
  local parent, needed = string.match(call('HGET', key, 'node:' .. node), '^(%-?%d+) (%d+)')
  local got = call('HINCRBY', key, 'got:' .. node, 1)
  if got ~= tonumber(needed) then
    return true, false
  end
  if parent == '-1' then
    return true, true
  end
  local _, met = contribute(key, parent, 'node ' .. node, signal_id)
  return true, met
end

-- The key under which the contribution of a signal at a leaf is distinct, by the rule of the leaf's node.
local function distinct_part(rule, leaf_index, signal)
  if rule == 'waitpoint' then
    return 'waitpoint ' .. signal.waitpoint_id
  elseif rule == 'signal' then
    return 'signal ' .. signal.signal_id
  elseif rule == 'source' then
    -- With its length, as either part may hold a space.
    return 'source ' .. #signal.source_type .. ' ' .. signal.source_type .. ' ' .. signal.source_identity
  end
  return 'leaf ' .. leaf_index
end

-- Applies a signal to the open suspension; `ref` is the argument of ff.signal_key. Returns the effect of the signal.
local function apply_signal(execution, ref, signal)
  local call = redis.call
  local key = ff.execution_key(execution, 'suspension')
  local leaves = tonumber(call('HGET', key, 'leaf_count'))
  local named, matched, new = false, false, false
  for j = 0, leaves - 1 do
    local leaf = call('HGET', key, 'leaf:' .. j)
    local node, waitpoint_id, kind, matcher = string.match(leaf, '^(%d+) (%S+) (%S+) (.*)$')
    if waitpoint_id == signal.waitpoint_id then
      named = true
      if matches(kind, matcher, signal) then
        matched = true
        local rule = string.match(call('HGET', key, 'node:' .. node), '(%S+)$')
        local added, met = contribute(key, node, distinct_part(rule, j, signal), signal.signal_id)
        new = new or added
        if met then
          call('RPUSH', ff.execution_key(execution, 'suspension_signals'), ref)
          return 'resume_condition_satisfied'
        end
      end
    end
  end
  if new then
    call('RPUSH', ff.execution_key(execution, 'suspension_signals'), ref)
    return 'appended_to_waitpoint'
  elseif matched then
    return 'appended_to_waitpoint_duplicate'
  elseif named then
    return 'signal_ignored_matcher_failed'
  end
  return 'signal_ignored_not_in_condition'
end

-- Whether args from `first` on are a condition of `node_count` nodes. Returns the place of its first leaf and the
-- number of leaves, or nil.
local function check_condition(args, first, node_count)
  local at = first
  for i = 0, node_count - 1 do
    local parent, needed = tonumber(args[at]), ff.integer(args[at + 1])
    if not parent or not needed or needed < 1 or parent >= i or (i == 0) ~= (parent < 0) or parent < -1 then
      return nil
    end
    at = at + 3
  end
  local leaf_count = ff.integer(args[at])
  if not leaf_count or leaf_count < 1 or leaf_count > MAX_LEAVES or #args ~= at + 4 * leaf_count then
    return nil
  end
  return at + 1, leaf_count
end

-- The waitpoints that the leaves of a condition name by their tokens: one for each leaf, from 0, and all as a set. Or
-- nil and the refusal.
local function find_waitpoints(execution, args, first_leaf, leaf_count, node_count)
  local tokens_key = ff.execution_key(execution, 'tokens')
  local of_leaf, involved = {}, {}
  for j = 0, leaf_count - 1 do
    local at = first_leaf + 4 * j
    local node, token = ff.integer(args[at]), args[at + 1]
    if not node or node >= node_count then
      return nil, ff.err('invalid_input', 'condition')
    end
    local waitpoint_id = redis.call('HGET', tokens_key, redis.sha1hex(token))
    if not waitpoint_id then
      return nil, ff.err('invalid_token')
    end
    of_leaf[j] = waitpoint_id
    if not involved[waitpoint_id] then
      local attempt_index = execution.fields.current_attempt_index
      local waitpoint = ff.hash(ff.waitpoint_key(execution, waitpoint_id))
      if not waitpoint or not token_is_valid(execution, waitpoint_id, waitpoint, token) then
        return nil, ff.err('invalid_token')
      end
      if waitpoint.attempt_index ~= attempt_index or not is_pending(execution, waitpoint) then
        return nil, ff.err('waitpoint_closed')
      end
      involved[waitpoint_id] = true
    end
  end
  return of_leaf, involved
end

-- Applies the buffered signals of all involved waitpoints, in the order of their arrival. Signals of other pending
-- waitpoints stay. Returns whether they met the condition.
local function apply_buffered(execution, involved)
  local call = redis.call
  local buffered_key = ff.execution_key(execution, 'signals_buffered')
  local buffered, satisfied = call('LRANGE', buffered_key, 0, -1), false
  call('DEL', buffered_key)
  for _, ref in ipairs(buffered) do
    local waitpoint_id = string.match(ref, '^[^:]+')
    if not involved[waitpoint_id] then
      if call('HGET', ff.waitpoint_key(execution, waitpoint_id), 'state') == 'pending' then
        call('RPUSH', buffered_key, ref)
      end
    elseif not satisfied then
      local signal = ff.hash(ff.signal_key(execution, ref))
      satisfied = signal and apply_signal(execution, ref, signal) == 'resume_condition_satisfied'
    end
  end
  return satisfied
end

-- ff_suspend_execution
--   keys:    core
--   args:    attempt_index lease_id lease_epoch suspension_id timeout_ms timeout_behavior reason node_count
--            condition...
--   returns: kind suspension_id
--   errors:  execution_not_found stale_owner suspended execution_not_active lease_expired waitpoint_closed
--            invalid_token invalid_input
--
-- The condition: for each node `parent needed distinct`, then leaf_count, then for each leaf `node token kind
-- matcher`. Signals that came before the suspension count. Where they already meet the condition the status is
-- ALREADY_SATISFIED, the waitpoints are closed, and the lease is kept; the same suspension_id again answers the same.
-- timeout_ms 0 is none.
redis.register_function('ff_suspend_execution', function(keys, args)
  local call = redis.call
  local core_key = keys[1]
  local attempt_index, lease_id, lease_epoch, suspension_id, timeout_ms, timeout_behavior, reason,
    node_count = unpack(args, 1, 8)
  local first_node = 9
  timeout_ms, node_count = ff.integer(timeout_ms), ff.integer(node_count)
  if not timeout_ms or not node_count or node_count < 1 or node_count > MAX_NODES then
    return ff.err('invalid_input', 'suspension')
  end
  local first_leaf, leaf_count = check_condition(args, first_node, node_count)
  if not first_leaf then
    return ff.err('invalid_input', 'condition')
  end
  local execution, reply = ff.load_releasable(core_key, attempt_index, lease_id, lease_epoch, 'suspended')
  if not execution then
    return reply
  end
  local key = ff.execution_key(execution, 'suspension')
  if call('HGET', key, 'suspension_id') == suspension_id then
    return ff.reply('ALREADY_SATISFIED', 'suspended', suspension_id)
  end
  local of_leaf, involved = find_waitpoints(execution, args, first_leaf, leaf_count, node_count)
  if not of_leaf then
    return involved
  end

  call('DEL', key, ff.execution_key(execution, 'suspension_signals'))
  call('HSET', key, 'suspension_id', suspension_id, 'attempt_index', attempt_index, 'created_at',
    ff.text(execution.now), 'timeout_behavior', timeout_behavior, 'reason', reason, 'leaf_count', ff.text(leaf_count))
  for i = 0, node_count - 1 do
    local at = first_node + 3 * i
    call('HSET', key, 'node:' .. i, args[at] .. ' ' .. args[at + 1] .. ' ' .. args[at + 2])
  end
  for j = 0, leaf_count - 1 do
    local at = first_leaf + 4 * j
    call('HSET', key, 'leaf:' .. j, args[at] .. ' ' .. of_leaf[j] .. ' ' .. args[at + 2] .. ' ' .. args[at + 3])
  end
  for waitpoint_id in pairs(involved) do
    call('HSET', ff.waitpoint_key(execution, waitpoint_id), 'state', 'active', 'suspension_id', suspension_id)
    call('ZREM', execution.timers_key, ff.waitpoint_timer(execution, waitpoint_id))
  end
  if apply_buffered(execution, involved) then
    ff.close_suspension(execution, 'resumed')
    return ff.reply('ALREADY_SATISFIED', 'suspended', suspension_id)
  end
  ff.interrupt_attempt(execution)
  ff.save_reply(execution, 'suspended', suspension_id)
  ff.move(execution, 'suspended', reason)
  if timeout_ms > 0 then
    ff.set_timer(execution, 'suspension', execution.now + timeout_ms)
  end
  return ff.ok('suspended', suspension_id)
end)

-- ff_deliver_signal
--   keys:    core
--   args:    waitpoint_id token signal_id signal_name signal_category source_type source_identity correlation_id
--            idempotency_key has_payload payload
--   returns: signal_id effect (lane_id required_capabilities eligible_score)...
--   errors:  payload_too_large execution_not_found invalid_token waitpoint_closed signal_limit_exceeded
--
-- The token is checked before the call answers anything about the waitpoint. A signal with the idempotency key of an
-- earlier one answers that one, with status DUPLICATE, also when it has resumed the execution. A pending waitpoint
-- keeps its signals for the suspension to come.
redis.register_function('ff_deliver_signal', function(keys, args)
  local call = redis.call
  local core_key = keys[1]
  local waitpoint_id, token, signal_id, signal_name, signal_category, source_type, source_identity, correlation_id,
    idempotency_key, has_payload, payload = unpack(args, 1, 11)
  if #payload > ff.MAX_SIGNAL then
    return ff.err('payload_too_large', ff.text(ff.MAX_SIGNAL), ff.text(#payload), 'signal')
  end
  local execution = ff.load(core_key)
  if not execution then
    return ff.err('execution_not_found')
  end
  local waitpoint_key = ff.waitpoint_key(execution, waitpoint_id)
  local waitpoint = ff.hash(waitpoint_key)
  if not token_is_valid(execution, waitpoint_id, waitpoint, token) then
    return ff.err('invalid_token')
  end
  local ref = waitpoint_id .. ':' .. signal_id
  local dedup_key = ff.execution_key(execution, 'signals_dedup')
  local dedup_field = #idempotency_key > 0 and waitpoint_id .. ' ' .. idempotency_key or nil
  local earlier = dedup_field and call('HGET', dedup_key, dedup_field) or ref
  local effect = call('HGET', ff.signal_key(execution, earlier), 'effect')
  if effect then
    return ff.reply('DUPLICATE', string.match(earlier, '[^:]+$'), effect)
  end
  local suspension = ff.hash(ff.execution_key(execution, 'suspension'))
  local open = execution.state == 'suspended' and waitpoint.state == 'active' and suspension
    and suspension.suspension_id == waitpoint.suspension_id
  if not open and not (is_pending(execution, waitpoint) and not ff.OUTCOMES[execution.state]) then
    return ff.err('waitpoint_closed')
  end
  if (tonumber(waitpoint.signal_count) or 0) >= MAX_SIGNALS then
    return ff.err('signal_limit_exceeded')
  end
  local signal = {
    signal_id = signal_id, waitpoint_id = waitpoint_id, signal_name = signal_name, source_type = source_type,
    source_identity = source_identity, correlation_id = correlation_id,
  }
  local signal_key = ff.signal_key(execution, ref)
  call('HSET', signal_key, 'signal_id', signal_id, 'waitpoint_id', waitpoint_id, 'signal_name', signal_name,
    'signal_category', signal_category, 'source_type', source_type, 'source_identity', source_identity,
    'correlation_id', correlation_id, 'accepted_at', ff.text(execution.now))
  if has_payload == '1' then
    call('HSET', signal_key, 'payload', payload)
  end
  call('RPUSH', ff.execution_key(execution, 'signals'), ref)
  call('HINCRBY', waitpoint_key, 'signal_count', 1)
  if dedup_field then
    call('HSET', dedup_key, dedup_field, ref)
  end
  effect = 'buffered_for_pending_waitpoint'
  if not open then
    call('RPUSH', ff.execution_key(execution, 'signals_buffered'), ref)
  else
    effect = apply_signal(execution, ref, signal)
    if effect == 'resume_condition_satisfied' then
      ff.close_suspension(execution, 'resumed')
      ff.move(execution, 'waiting', 'resumed')
    end
  end
  call('HSET', signal_key, 'effect', effect)
  return ff.with_hints(ff.ok(signal_id, effect), execution.hints)
end)

-- ff_observe_signals
--   keys:    core
--   args:    attempt_index lease_id lease_epoch
--   returns: signals
--   errors:  execution_not_found stale_owner suspended execution_not_active lease_expired
--
-- The signals, as field lists, that met the condition of the suspension after which this lease was granted.
redis.register_function({
  function_name = 'ff_observe_signals',
  callback = function(keys, args)
    local core_key = keys[1]
    local attempt_index, lease_id, lease_epoch = unpack(args, 1, 3)
    local execution, refusal = ff.load_owned(core_key, attempt_index, lease_id, lease_epoch)
    if not execution then
      return refusal
    end
    local suspension = ff.hash(ff.execution_key(execution, 'suspension')) or {}
    local signals = {}
    if suspension.attempt_index == attempt_index and suspension.close_reason == 'resumed' then
      for _, signal in ipairs(redis.call('LRANGE', ff.execution_key(execution, 'suspension_signals'), 0, -1)) do
        signals[#signals + 1] = redis.call('HGETALL', ff.signal_key(execution, signal))
      end
    end
    return ff.ok(signals)
  end,
  flags = { 'no-writes' },
})

-- The timeout of a suspension.
function ff.expire_suspension(execution)
  local behavior = redis.call('HGET', ff.execution_key(execution, 'suspension'), 'timeout_behavior')
  if behavior == 'auto_resume' then
    ff.close_suspension(execution, 'timed_out')
    ff.move(execution, 'waiting', 'suspension_timeout')
  elseif behavior == 'escalate' then
    ff.clear_timer(execution, 'suspension')
    ff.set(execution, 'escalated_at', ff.text(execution.now))
  elseif behavior == 'cancel' then
    ff.set(execution, 'cancellation_reason', 'suspension_timeout', 'cancelled_from', 'suspended')
    ff.move(execution, 'cancelled', 'suspension_timeout')
  elseif behavior == 'expire' then
    ff.move(execution, 'expired', 'suspension_timeout')
  else
    ff.set(execution, 'failure_reason', 'suspension_timeout', 'failure_class', 'timeout')
    ff.move(execution, 'failed', 'suspension_timeout')
  end
end
