-- Waitpoints, their tokens, suspension and signals.
--
-- A waitpoint belongs to one attempt. It is pending until a suspension names it, then active, then closed for good. Its
-- token is `<kid>:<HMAC-SHA1 hex>` over execution, waitpoint and creation time, each with its length before it, under a
-- key of the partition's ring: the newest mints, and earlier ones verify until their grace is over.

-- Signals of one waitpoint; each is a key of the partition.
local MAX_SIGNALS = 10000

local function bytes_of(hex)
  return (string.gsub(hex, '%x%x', function(pair)
    return string.char(tonumber(pair, 16))
  end))
end

-- HMAC with the one digest that the server offers (RFC 2104, block of 64 bytes). Keys are 64 hex digits, so shorter
-- than a block.
local function hmac_sha1(key_hex, message)
  local key = bytes_of(key_hex)
  local inner, outer = {}, {}
  for i = 1, 64 do
    local byte = string.byte(key, i) or 0
    inner[i] = string.char(bit.bxor(byte, 0x36))
    outer[i] = string.char(bit.bxor(byte, 0x5c))
  end
  return redis.sha1hex(table.concat(outer) .. bytes_of(redis.sha1hex(table.concat(inner) .. message)))
end

-- Both have the length of a digest; the time taken does not depend on where they differ.
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

local function ring_key(x)
  return 'ff:sec:' .. x.tag .. ':waitpoint_hmac'
end

-- The kid and the key that mint. A ring that is empty takes the caller's.
local function minting_key(x, kid, secret)
  local ring = ring_key(x)
  local current = redis.call('HGET', ring, 'current_kid')
  if not current then
    redis.call('HSET', ring, 'current_kid', kid, 'secret:' .. kid, secret)
    return kid, secret
  end
  return current, redis.call('HGET', ring, 'secret:' .. current)
end

-- Whether `token` is the token of the waitpoint whose hash `wp` is.
local function token_is_valid(x, waitpoint_id, wp, token)
  local kid, digest = string.match(token, '^([^:]+):(%x+)$')
  if not kid or #digest ~= 40 then
    return false
  end
  local ring = redis.call('HMGET', ring_key(x), 'current_kid', 'secret:' .. kid, 'expires_at:' .. kid)
  -- Every path computes a digest, so a refusal says nothing by its time about which kids and waitpoints exist.
  local secret = ring[2] or string.rep('0', 64)
  local expected = hmac_sha1(secret, token_message(x.id, waitpoint_id, wp and wp.created_at or '0'))
  local usable = ring[2] and wp and wp.execution_id == x.id
    and (kid == ring[1] or (ring[3] and tonumber(ring[3]) >= x.now))
  return same_digest(expected, digest) and usable and true or false
end

local function hash(key)
  local flat = redis.call('HGETALL', key)
  if #flat == 0 then
    return nil
  end
  local fields = {}
  for i = 1, #flat, 2 do
    fields[flat[i]] = flat[i + 1]
  end
  return fields
end

local function waitpoint_key(x, waitpoint_id)
  return 'ff:wp:' .. x.tag .. ':' .. waitpoint_id
end

-- A signal is known by its waitpoint and its id: one that goes to two waitpoints is stored twice.
local function signal_key(x, signal)
  return 'ff:signal:' .. x.tag .. ':' .. signal
end

-- Whether a waitpoint still takes signals for a suspension to come, by the server's clock.
local function is_pending(x, wp)
  return wp.state == 'pending' and tonumber(wp.expires_at) > x.now
end

-- ff_rotate_waitpoint_secret
--   keys:    ring
--   args:    kid secret grace_ms
--   returns: previous_kid
--   errors:  rotation_conflict invalid_input
--
-- Tokens of the key before stay valid for the grace. The same kid with the same secret changes nothing.
redis.register_function('ff_rotate_waitpoint_secret', function(keys, args)
  local call = redis.call
  local grace_ms = ff.integer(args[3])
  if not grace_ms or not string.find(args[1], '^[%w%-_%.]+$') or #args[2] ~= 64 or string.find(args[2], '[^0-9a-f]') then
    return ff.err('invalid_input', 'key')
  end
  local now = ff.now_ms()
  local current = call('HGET', keys[1], 'current_kid')
  if current == args[1] then
    if call('HGET', keys[1], 'secret:' .. current) ~= args[2] then
      return ff.err('rotation_conflict')
    end
    return ff.ok(current)
  end
  local known = call('HGET', keys[1], 'secret:' .. args[1])
  if known and known ~= args[2] then
    return ff.err('rotation_conflict')
  end
  for _, field in ipairs(call('HKEYS', keys[1])) do
    local kid = string.match(field, '^expires_at:(.*)$')
    if kid and tonumber(call('HGET', keys[1], field)) < now then
      call('HDEL', keys[1], field, 'secret:' .. kid)
    end
  end
  if current then
    call('HSET', keys[1], 'expires_at:' .. current, ff.text(now + grace_ms))
  end
  -- A key that comes back is current again: an end that it was given before does not count.
  call('HDEL', keys[1], 'expires_at:' .. args[1])
  call('HSET', keys[1], 'current_kid', args[1], 'secret:' .. args[1], args[2])
  return ff.ok(current or '')
end)

-- ff_create_waitpoint
--   keys:    core
--   args:    attempt_index lease_id lease_epoch waitpoint_id expires_ms kid secret
--   returns: token
--   errors:  execution_not_found stale_owner suspended execution_not_active lease_expired waitpoint_conflict invalid_input
--
-- The same id again answers the same token. expires_ms is how long it may stay pending.
redis.register_function('ff_create_waitpoint', function(keys, args)
  local call = redis.call
  local expires_ms = ff.integer(args[5])
  if not expires_ms or expires_ms < 1 or #args[7] ~= 64 or string.find(args[7], '[^0-9a-f]') then
    return ff.err('invalid_input', 'waitpoint')
  end
  local x, refusal = ff.owned(keys[1], args)
  if not x then
    return refusal
  end
  local key = waitpoint_key(x, args[4])
  local existing = hash(key)
  if existing and (existing.execution_id ~= x.id or existing.attempt_index ~= args[1]) then
    return ff.err('waitpoint_conflict')
  end
  local created_at = existing and existing.created_at or ff.text(x.now)
  local kid, secret = minting_key(x, args[6], args[7])
  local token = kid .. ':' .. hmac_sha1(secret, token_message(x.id, args[4], created_at))
  if not existing then
    call('HSET', key, 'waitpoint_id', args[4], 'execution_id', x.id, 'attempt_index', args[1], 'state', 'pending',
      'created_at', created_at, 'expires_at', ff.text(x.now + expires_ms))
    call('SADD', x.prefix .. 'waitpoints', args[4])
    call('ZADD', x.timers, ff.text(x.now + expires_ms), 'waitpoint:' .. x.id .. ':' .. args[4])
  end
  -- A condition names the waitpoint by its token.
  call('HSET', x.prefix .. 'tokens', redis.sha1hex(token), args[4])
  return ff.ok(token)
end)

-- The suspension hash holds its condition as a tree in flat form.
--   node:<i>    parent needed distinct     node 0 is the root, parent -1
--   leaf:<j>    node waitpoint_id kind matcher
--   have:<i>:<what>   the signal that contributed; counted in got:<i>
-- A node has what it needs when enough distinct contributions came. What makes one distinct is the node's own:
-- `waitpoint`, `signal`, `source`, or `leaf` (each leaf once). A node that got what it needs is one contribution to its
-- parent.

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

-- Lets a signal work on the open suspension. Returns its effect.
local function apply_signal(x, ref, signal)
  local waitpoint_id = signal.waitpoint_id
  local call = redis.call
  local key = x.prefix .. 'suspension:current'
  local leaves = tonumber(call('HGET', key, 'leaf_count'))
  local named, matched, new = false, false, false
  for j = 0, leaves - 1 do
    local leaf = call('HGET', key, 'leaf:' .. j)
    local node, waitpoint, kind, matcher = string.match(leaf, '^(%d+) (%S+) (%S+) (.*)$')
    if waitpoint == waitpoint_id then
      named = true
      if matches(kind, matcher, signal) then
        matched = true
        local distinct = string.match(call('HGET', key, 'node:' .. node), '(%S+)$')
        local what
        if distinct == 'waitpoint' then
          what = 'waitpoint ' .. waitpoint
        elseif distinct == 'signal' then
          what = 'signal ' .. signal.signal_id
        elseif distinct == 'source' then
          what = 'source ' .. #signal.source_type .. ' ' .. signal.source_type .. ' ' .. signal.source_identity
        else
          what = 'leaf ' .. j
        end
        local added, met = contribute(key, node, what, signal.signal_id)
        new = new or added
        if met then
          call('RPUSH', x.prefix .. 'suspension:signals', ref)
          return 'resume_condition_satisfied'
        end
      end
    end
  end
  if new then
    call('RPUSH', x.prefix .. 'suspension:signals', ref)
    return 'appended_to_waitpoint'
  elseif matched then
    return 'appended_to_waitpoint_duplicate'
  elseif named then
    return 'signal_ignored_matcher_failed'
  end
  return 'signal_ignored_not_in_condition'
end

-- ff_suspend_execution
--   keys:    core
--   args:    attempt_index lease_id lease_epoch suspension_id timeout_ms timeout_behavior reason node_count condition...
--   returns: kind suspension_id
--   errors:  execution_not_found stale_owner suspended execution_not_active lease_expired waitpoint_closed invalid_token invalid_input
--
-- The condition: for each node `parent needed distinct`, then leaf_count, then for each leaf `node token kind matcher`.
-- Signals that came before count. Where they already meet the condition the status is ALREADY_SATISFIED, the
-- waitpoints are closed, and the lease is kept; the same suspension_id again answers the same. timeout_ms 0 is none.
redis.register_function('ff_suspend_execution', function(keys, args)
  local call = redis.call
  local timeout_ms, nodes = ff.integer(args[5]), ff.integer(args[8])
  if not timeout_ms or not nodes or nodes < 1 or nodes > 256 then
    return ff.err('invalid_input', 'suspension')
  end
  local at = 9
  for i = 0, nodes - 1 do
    local parent, needed = tonumber(args[at]), ff.integer(args[at + 1])
    if not parent or not needed or needed < 1 or parent >= i or (i == 0) ~= (parent < 0) or parent < -1 then
      return ff.err('invalid_input', 'condition')
    end
    at = at + 3
  end
  local leaves = ff.integer(args[at])
  if not leaves or leaves < 1 or leaves > 256 or #args ~= at + 4 * leaves then
    return ff.err('invalid_input', 'condition')
  end
  local x, reply = ff.giving_up(keys[1], args, 'suspended')
  if not x then
    return reply
  end
  local key = x.prefix .. 'suspension:current'
  if call('HGET', key, 'suspension_id') == args[4] then
    return { 1, 'ALREADY_SATISFIED', 'suspended', args[4] }
  end
  -- A leaf names its waitpoint by its token.
  local first_leaf, found, involved = at + 1, {}, {}
  for j = 0, leaves - 1 do
    local leaf = first_leaf + 4 * j
    local node = ff.integer(args[leaf])
    if not node or node >= nodes then
      return ff.err('invalid_input', 'condition')
    end
    local waitpoint = call('HGET', x.prefix .. 'tokens', redis.sha1hex(args[leaf + 1]))
    if not waitpoint then
      return ff.err('invalid_token')
    end
    found[j] = waitpoint
    if not involved[waitpoint] then
      local wp = hash(waitpoint_key(x, waitpoint))
      if not wp or not token_is_valid(x, waitpoint, wp, args[leaf + 1]) then
        return ff.err('invalid_token')
      end
      if wp.attempt_index ~= args[1] or not is_pending(x, wp) then
        return ff.err('waitpoint_closed')
      end
      involved[waitpoint] = true
    end
  end

  call('DEL', key, x.prefix .. 'suspension:signals')
  call('HSET', key, 'suspension_id', args[4], 'attempt_index', args[1], 'created_at', ff.text(x.now),
    'timeout_behavior', args[6], 'reason', args[7], 'leaf_count', ff.text(leaves))
  for i = 0, nodes - 1 do
    call('HSET', key, 'node:' .. i, args[9 + 3 * i] .. ' ' .. args[10 + 3 * i] .. ' ' .. args[11 + 3 * i])
  end
  for j = 0, leaves - 1 do
    local leaf = first_leaf + 4 * j
    call('HSET', key, 'leaf:' .. j, args[leaf] .. ' ' .. found[j] .. ' ' .. args[leaf + 2] .. ' ' .. args[leaf + 3])
  end
  local satisfied = false
  for waitpoint in pairs(involved) do
    call('HSET', waitpoint_key(x, waitpoint), 'state', 'active', 'suspension_id', args[4])
    call('ZREM', x.timers, 'waitpoint:' .. x.id .. ':' .. waitpoint)
  end
  -- In the order in which the signals came, whatever waitpoint they came to. Those of other waitpoints stay.
  local buffered = call('LRANGE', x.prefix .. 'signals:buffered', 0, -1)
  call('DEL', x.prefix .. 'signals:buffered')
  for _, ref in ipairs(buffered) do
    local waitpoint = string.match(ref, '^[^:]+')
    if not involved[waitpoint] then
      if call('HGET', waitpoint_key(x, waitpoint), 'state') == 'pending' then
        call('RPUSH', x.prefix .. 'signals:buffered', ref)
      end
    elseif not satisfied then
      local signal = hash(signal_key(x, ref))
      satisfied = signal and apply_signal(x, ref, signal) == 'resume_condition_satisfied'
    end
  end
  if satisfied then
    ff.close_suspension(x, 'resumed')
    return { 1, 'ALREADY_SATISFIED', 'suspended', args[4] }
  end
  ff.interrupt_attempt(x)
  ff.remember(x, args, 'suspended', args[4])
  ff.move(x, 'suspended', args[7])
  if timeout_ms > 0 then
    ff.set_timer(x, 'suspension', x.now + timeout_ms)
  end
  return ff.ok('suspended', args[4])
end)

-- ff_deliver_signal
--   keys:    core
--   args:    waitpoint_id token signal_id signal_name signal_category source_type source_identity correlation_id idempotency_key has_payload payload
--   returns: signal_id effect (lane_id eligible_score)...
--   errors:  execution_not_found invalid_token waitpoint_closed signal_limit_exceeded
--
-- The token is checked before anything of the waitpoint is told. A signal with the idempotency key of an earlier one
-- answers that one, with status DUPLICATE, also when it has resumed the execution. A pending waitpoint keeps its
-- signals for the suspension to come.
redis.register_function('ff_deliver_signal', function(keys, args)
  local call = redis.call
  local x = ff.load(keys[1])
  if not x then
    return ff.err('execution_not_found')
  end
  local wp = hash(waitpoint_key(x, args[1]))
  if not token_is_valid(x, args[1], wp, args[2]) then
    return ff.err('invalid_token')
  end
  local ref = args[1] .. ':' .. args[3]
  local dedup = #args[9] > 0 and args[1] .. ' ' .. args[9] or nil
  local earlier = dedup and call('HGET', x.prefix .. 'signals:dedup', dedup) or ref
  local effect = call('HGET', signal_key(x, earlier), 'effect')
  if effect then
    return { 1, 'DUPLICATE', string.match(earlier, '[^:]+$'), effect }
  end
  local suspension = hash(x.prefix .. 'suspension:current')
  local open = x.state == 'suspended' and wp.state == 'active' and suspension
    and suspension.suspension_id == wp.suspension_id
  if not open and not (is_pending(x, wp) and not ff.OUTCOMES[x.state]) then
    return ff.err('waitpoint_closed')
  end
  if (tonumber(wp.signal_count) or 0) >= MAX_SIGNALS then
    return ff.err('signal_limit_exceeded')
  end
  local signal = {
    signal_id = args[3], waitpoint_id = args[1], signal_name = args[4], signal_category = args[5],
    source_type = args[6], source_identity = args[7], correlation_id = args[8],
  }
  local key = signal_key(x, ref)
  call('HSET', key, 'signal_id', args[3], 'waitpoint_id', args[1], 'signal_name', args[4], 'signal_category', args[5],
    'source_type', args[6], 'source_identity', args[7], 'correlation_id', args[8], 'accepted_at', ff.text(x.now))
  if args[10] == '1' then
    call('HSET', key, 'payload', args[11])
  end
  call('RPUSH', x.prefix .. 'signals', ref)
  call('HINCRBY', waitpoint_key(x, args[1]), 'signal_count', 1)
  if dedup then
    call('HSET', x.prefix .. 'signals:dedup', dedup, ref)
  end
  effect = 'buffered_for_pending_waitpoint'
  if not open then
    call('RPUSH', x.prefix .. 'signals:buffered', ref)
  else
    effect = apply_signal(x, ref, signal)
    if effect == 'resume_condition_satisfied' then
      ff.close_suspension(x, 'resumed')
      ff.move(x, 'waiting', 'resumed')
    end
  end
  call('HSET', key, 'effect', effect)
  return ff.ok_with_hints(x, args[3], effect)
end)

-- ff_observe_signals
--   keys:    core
--   args:    attempt_index lease_id lease_epoch
--   returns: signal...
--   errors:  execution_not_found stale_owner suspended execution_not_active lease_expired
--
-- The signals, as field lists, that met the condition of the suspension after which this lease was granted.
redis.register_function({
  function_name = 'ff_observe_signals',
  callback = function(keys, args)
    local x, refusal = ff.owned(keys[1], args)
    if not x then
      return refusal
    end
    local suspension = redis.call('HMGET', x.prefix .. 'suspension:current', 'attempt_index', 'close_reason')
    local signals = {}
    if suspension[1] == args[1] and suspension[2] == 'resumed' then
      for _, signal in ipairs(redis.call('LRANGE', x.prefix .. 'suspension:signals', 0, -1)) do
        signals[#signals + 1] = redis.call('HGETALL', signal_key(x, signal))
      end
    end
    return { 1, 'OK', signals }
  end,
  flags = { 'no-writes' },
})

-- What happens when nobody met the condition in time.
function ff.expire_suspension(x)
  local behavior = redis.call('HGET', x.prefix .. 'suspension:current', 'timeout_behavior')
  if behavior == 'auto_resume' then
    ff.close_suspension(x, 'timed_out')
    ff.move(x, 'waiting', 'suspension_timeout')
  elseif behavior == 'escalate' then
    ff.clear_timer(x, 'suspension')
    ff.set(x, 'escalated_at', ff.text(x.now))
  elseif behavior == 'cancel' then
    ff.set(x, 'cancellation_reason', 'suspension_timeout', 'cancelled_from', 'suspended')
    ff.move(x, 'cancelled', 'suspension_timeout')
  elseif behavior == 'expire' then
    ff.move(x, 'expired', 'suspension_timeout')
  else
    ff.set(x, 'failure_reason', 'suspension_timeout', 'failure_class', 'timeout')
    ff.move(x, 'failed', 'suspension_timeout')
  end
end
