-- Waitpoints, their tokens, suspension and signals.
--
-- A waitpoint belongs to one attempt, and is open to one suspension. All waitpoints of an execution are fields of one
-- hash, `<attempt index> <created_at> <expires_at> <signal count> <suspension id, or ->`; whether one is open follows
-- from the state of the execution, so the end of an attempt or a suspension writes to none of them.
-- Its token is `<kid>:<HMAC-SHA1 hex>`, where kid is the id of a secret on the partition's ring. The digest covers
-- execution, waitpoint and creation time, each with its length before it. The newest secret signs; earlier ones
-- verify until their grace is over.

-- Most signals of one waitpoint.
local MAX_SIGNALS = 10000
local MAX_NODES, MAX_LEAVES = 256, 256
local MAX_SECRETS = 64
local PAGE = 256
-- A call takes no more steps than this over a condition and its buffered signals, at about 5 us each.
local MAX_STEPS = 200

local function parse_waitpoint(text)
  local attempt_index, created_at, expires_at, count, suspension_id =
    string.match(text or '', '^(%d+) (%d+) (%d+) (%d+) (%S+)$')
  return attempt_index and {
    attempt_index = attempt_index, created_at = created_at, expires_at = tonumber(expires_at),
    signal_count = tonumber(count), suspension_id = suspension_id,
  }
end

local function waitpoint_text(waitpoint)
  return string.format('%s %s %d %d %s', waitpoint.attempt_index, waitpoint.created_at, waitpoint.expires_at,
    waitpoint.signal_count, waitpoint.suspension_id)
end

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

-- The ring of a partition expires a day after its last use, and not while a token of it may be needed: until the latest
-- end of a pending waitpoint, and while an execution of the partition is suspended. `needed_until` and `suspended` keep
-- these two, so no token is ever looked for.
local RING_MS = 86400000

-- They have a key of their own, as whoever ends a suspended execution need not be able to read secrets.

-- Has the ring expire when it is needed no more. Reads its use, and returns what writes the use: after a change of
-- the number of suspended executions, and with `until_ms` as the end of a new use.
local function ring_use(slot_tag, now)
  local call = redis.call
  local use_key, ring_key = ff.key('waitpoint_use', slot_tag), ff.key('waitpoint_secrets', slot_tag)
  local stored = call('HMGET', use_key, 'suspended', 'needed_until')
  return function(change, until_ms)
    local suspended = math.max((ff.integer(stored[1]) or 0) + change, 0)
    local last = math.max(ff.integer(stored[2]) or 0, until_ms or 0, now + RING_MS)
    call('HSET', use_key, 'needed_until', ff.text(last), 'suspended', ff.text(suspended))
    if suspended > 0 then
      call('PERSIST', ring_key)
      call('PERSIST', use_key)
    else
      call('PEXPIREAT', ring_key, ff.text(last))
      call('PEXPIREAT', use_key, ff.text(last))
    end
  end
end

-- Counts an execution of the partition that becomes suspended (1) or ceases to be (-1).
function ff.count_suspended(execution, change)
  ring_use(execution.slot_tag, execution.now)(change)
end

-- Whether a secret of the ring verifies tokens: the newest, and an earlier one until its grace is over.
local function usable_kid(execution, kid)
  local ring_key = ff.key('waitpoint_secrets', execution.slot_tag)
  local current, expires_at, secret = unpack(
    redis.call('HMGET', ring_key, 'current_kid', 'expires_at:' .. kid, 'secret:' .. kid)
  )
  return secret and (kid == current or (ff.integer(expires_at) or 0) >= execution.now), secret
end

-- Whether `token` is the token of a waitpoint, which may be nil.
local function token_is_valid(execution, waitpoint_id, waitpoint, token)
  local kid, digest = string.match(token, '^([^:]+):(%x+)$')
  if not kid or #digest ~= 40 then
    return false
  end
  -- Every path computes a digest, so the time of a refusal does not tell which kids and waitpoints exist.
  local usable, secret = usable_kid(execution, kid)
  local message = token_message(execution.id, waitpoint_id, waitpoint and waitpoint.created_at or '0')
  local expected = hmac_sha1(secret or string.rep('0', 64), message)
  return same_digest(expected, digest) and usable and waitpoint and true or false
end

-- Whether a waitpoint still takes signals for a suspension to come, by the server's clock: its attempt goes on.
local function is_pending(execution, waitpoint)
  local state, fields = execution.state, execution.fields
  return waitpoint.suspension_id == '-' and waitpoint.expires_at > execution.now
    and waitpoint.attempt_index == fields.current_attempt_index and not ff.OUTCOMES[state]
    and (state == 'active' or state == 'suspended' or fields.interrupted == '1')
end

-- ff_rotate_waitpoint_secret
--   keys:    ring
--   args:    kid secret grace_ms
--   returns: previous_kid
--   errors:  rotation_conflict invalid_input
--
-- Tokens of the previous secret stay valid for the grace. The same kid with the same secret changes nothing. The ring
-- holds at most MAX_SECRETS earlier secrets whose grace is not over; more are a rotation_conflict.
redis.register_function('ff_rotate_waitpoint_secret', function(keys, args)
  local call = redis.call
  local ring_key = keys[1]
  local kid, secret, grace_ms = unpack(args, 1, 3)
  grace_ms = ff.integer(grace_ms)
  if not grace_ms or not is_kid(kid) or not is_secret(secret) then
    return ff.err('invalid_input', 'key')
  end
  local now = ff.now_ms()
  local ring = ff.hash(ring_key) or {}
  local current, known = ring.current_kid, ring['secret:' .. kid]
  if known and known ~= secret then
    return ff.err('rotation_conflict')
  end
  if current == kid then
    return ff.ok(current)
  end
  local use, kept = ring_use(ff.slot_tag_of(ring_key), now), 0
  for field, expires_at in pairs(ring) do
    local earlier = string.match(field, '^expires_at:(.*)$')
    if earlier and (ff.integer(expires_at) or 0) >= now then
      kept = kept + 1
    end
  end
  if kept >= MAX_SECRETS then
    return ff.err('rotation_conflict')
  end
  for field, expires_at in pairs(ring) do
    local earlier = string.match(field, '^expires_at:(.*)$')
    if earlier and (ff.integer(expires_at) or 0) < now then
      call('HDEL', ring_key, field, 'secret:' .. earlier)
    end
  end
  if current then
    call('HSET', ring_key, 'expires_at:' .. current, ff.text(now + grace_ms))
  end
  -- A secret that becomes current again has no end.
  call('HDEL', ring_key, 'expires_at:' .. kid)
  call('HSET', ring_key, 'current_kid', kid, 'secret:' .. kid, secret)
  use(0, now + grace_ms)
  return ff.ok(current or '')
end)

-- ff_create_waitpoint
--   keys:    core
--   args:    attempt_index lease_id lease_epoch waitpoint_id expires_ms kid secret
--   returns: token
--   errors:  execution_not_found stale_owner state_lost suspended execution_not_active lease_expired waitpoint_conflict
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
  local waitpoints_key, tokens_key = ff.execution_key(execution, 'waitpoints'), ff.execution_key(execution, 'tokens')
  local waitpoint = parse_waitpoint(call('HGET', waitpoints_key, waitpoint_id))
  if waitpoint and waitpoint.attempt_index ~= attempt_index then
    return ff.err('waitpoint_conflict')
  end
  ff.expect('tokens', tokens_key)
  local ring_key = ff.key('waitpoint_secrets', execution.slot_tag)
  local current, use = call('HGET', ring_key, 'current_kid'), ring_use(execution.slot_tag, execution.now)
  local signing_kid, signing = current or kid, secret
  if current then
    signing = call('HGET', ring_key, 'secret:' .. current)
    if not signing or not is_secret(signing) then
      ff.corrupt('waitpoint_secrets')
    end
  else
    call('HSET', ring_key, 'current_kid', kid, 'secret:' .. kid, secret)
  end
  if not waitpoint then
    waitpoint = {
      attempt_index = attempt_index, created_at = ff.text(execution.now), expires_at = execution.now + expires_ms,
      signal_count = 0, suspension_id = '-',
    }
    call('HSET', waitpoints_key, waitpoint_id, waitpoint_text(waitpoint))
  end
  use(0, waitpoint.expires_at)
  local message = token_message(execution.id, waitpoint_id, waitpoint.created_at)
  local token = signing_kid .. ':' .. hmac_sha1(signing, message)
  -- A condition names the waitpoint by its token.
  call('HSET', tokens_key, redis.sha1hex(token), waitpoint_id)
  return ff.ok(token)
end)

-- The suspension hash holds what it waits for and what has contributed:
--   condition    a tree as one packed list: for each node `parent needed distinct`, where node 0 is the root and has
--                parent -1; then for each leaf `node waitpoint_id kind matcher`
--   have:<i>:<what>   the signal that contributed to node i; counted in got:<i>
--   seen:<waitpoint_id>   how many of its buffered signals were applied
-- A node is met when it has as many distinct contributions as it needs. Its rule of distinctness is `waitpoint`,
-- `signal`, `source`, or `leaf` (each leaf once). A met node contributes once to its parent.
--
-- A call reads the tree, applies signals to it in memory, and writes what is new at its end. The leaves stand in groups
-- by what they match, so a signal meets only those that it matches. In a group a rule of `leaf` or `waitpoint` takes
-- the first signal alone, and other rules take a signal once for each node.

local RULES = { leaf = true, waitpoint = true, signal = true, source = true }
local KINDS = { signal_name = true, correlation_id = true, external = true }

local function add_leaf(tree, index, node, waitpoint_id, kind, matcher)
  local name = kind == 'external' and kind or kind .. ' ' .. matcher
  local groups = tree.groups[waitpoint_id] or {}
  local group = groups[name] or { once = {}, each = {}, nodes = {} }
  tree.groups[waitpoint_id], groups[name] = groups, group
  if node.rule == 'leaf' or node.rule == 'waitpoint' then
    group.once[#group.once + 1] = { node = node, index = index }
  elseif not group.nodes[node] then
    group.nodes[node] = true
    group.each[#group.each + 1] = { node = node, index = index }
  end
end

-- The tree of a condition, of which `is_new` says that nothing has contributed yet; nil where the list is no condition
-- of `node_count` nodes.
local function tree_of(key, condition, node_count, is_new)
  local nodes = {}
  local tree = {
    key = key, is_new = is_new, nodes = nodes, groups = {}, writes = {}, order = {}, got = {}, refs = {},
    -- The largest condition, of 256 nodes and 256 leaves, leaves some steps for its signals.
    steps = math.floor(#condition / 10),
  }
  for i = 0, node_count - 1 do
    local at = 3 * i
    local parent, needed, rule = condition[at + 1], ff.integer(condition[at + 2]), condition[at + 3]
    parent = parent == '-1' and -1 or ff.integer(parent)
    if not parent or parent >= i or (i == 0) ~= (parent < 0) or not needed or needed < 1 or not RULES[rule] then
      return nil
    end
    nodes[i] = { index = i, parent = parent, needed = needed, rule = rule }
  end
  for at = 3 * node_count, #condition - 1, 4 do
    local node, waitpoint_id, kind, matcher = unpack(condition, at + 1, at + 4)
    node = nodes[ff.integer(node)]
    if not node or not KINDS[kind] or not matcher then
      return nil
    end
    add_leaf(tree, (at - 3 * node_count) / 4, node, waitpoint_id, kind, matcher)
  end
  return tree
end

-- The condition of an open suspension.
local function stored_condition(packed)
  local intact, condition = pcall(cmsgpack.unpack, packed or '')
  if not intact or type(condition) ~= 'table' then
    ff.corrupt('suspension')
  end
  for _, part in ipairs(condition) do
    if type(part) ~= 'string' then
      ff.corrupt('suspension')
    end
  end
  return condition
end

-- Gives one contribution to a node, and on to its parents. Returns whether it was new, and whether the root is met.
local function contribute(tree, node, what, signal_id)
  local field = 'have:' .. node.index .. ':' .. what
  tree.steps = tree.steps + 1
  if tree.writes[field] or (not tree.is_new and redis.call('HEXISTS', tree.key, field) == 1) then
    return false, false
  end
  tree.writes[field] = signal_id
  tree.order[#tree.order + 1] = field
  local got = tree.got[node]
  if not got then
    got = not tree.is_new and ff.integer(redis.call('HGET', tree.key, 'got:' .. node.index)) or 0
  end
  tree.got[node] = got + 1
  if got + 1 ~= node.needed then
    return true, false
  end
  local parent = tree.nodes[node.parent]
  if not parent then
    return true, true
  end
  local _, met = contribute(tree, parent, 'node ' .. node.index, signal_id)
  return true, met
end

-- What makes the contribution of a signal at a leaf distinct, by the rule of the leaf's node.
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

-- Applies a signal to the tree. Returns its effect.
local function apply_signal(tree, signal)
  tree.steps = tree.steps + 1
  local groups, matched, new, met = tree.groups[signal.waitpoint_id], false, false, false
  if not groups then
    return 'signal_ignored_not_in_condition'
  end
  local function take(leaves)
    for _, leaf in ipairs(leaves) do
      local added
      added, met = contribute(tree, leaf.node, distinct_part(leaf.node.rule, leaf.index, signal), signal.signal_id)
      new = new or added
      if met then
        return
      end
    end
  end
  local names = { 'signal_name ' .. signal.signal_name, 'correlation_id ' .. signal.correlation_id, 'external' }
  for _, name in ipairs(names) do
    local group = groups[name]
    if group and not met then
      matched = true
      take(group.once)
      group.once = {}
      if not met then
        take(group.each)
      end
    end
  end
  if new then
    tree.refs[#tree.refs + 1] = signal.waitpoint_id .. ':' .. signal.signal_id
  end
  if met then
    return 'resume_condition_satisfied'
  elseif new then
    return 'appended_to_waitpoint'
  elseif matched then
    return 'appended_to_waitpoint_duplicate'
  end
  return 'signal_ignored_matcher_failed'
end

-- Stores what was applied to the tree.
local function save_tree(execution, tree)
  local flat = {}
  for _, field in ipairs(tree.order) do
    flat[#flat + 1], flat[#flat + 2] = field, tree.writes[field]
  end
  for node, got in pairs(tree.got) do
    flat[#flat + 1], flat[#flat + 2] = 'got:' .. node.index, ff.text(got)
  end
  ff.write_list('HSET', tree.key, flat)
  ff.write_list('RPUSH', ff.execution_key(execution, 'suspension_signals'), tree.refs)
end

-- A signal to a pending waitpoint is buffered: a member of a sorted set whose scores are all 0, so it is ordered as
-- text, `<waitpoint id>:<number of the signal, 16 digits>:<what conditions look at>`.
local function buffered_place(waitpoint_id, number)
  return string.format('%s:%016d', waitpoint_id, number)
end

-- Applies buffered signals of waitpoints to the tree, those of each in the order of their arrival, as far as one call
-- may. `seen` has the number of each waitpoint's signals that were applied, and is advanced. Returns whether they met
-- the condition, and whether all were applied.
local function apply_buffered(execution, tree, waitpoints, seen)
  local buffered_key = ff.execution_key(execution, 'signals_buffered')
  for _, waitpoint in ipairs(waitpoints) do
    local waitpoint_id = waitpoint.id
    while seen[waitpoint_id] < waitpoint.signal_count do
      local left = MAX_STEPS - tree.steps
      if left <= 0 then
        return false, false
      end
      -- `;` follows `:`, so the range ends with the waitpoint.
      local page = redis.call('ZRANGEBYLEX', buffered_key, '[' .. buffered_place(waitpoint_id, seen[waitpoint_id] + 1),
        '(' .. waitpoint_id .. ';', 'LIMIT', 0, math.min(left, 64))
      tree.steps = tree.steps + 1
      if #page == 0 then
        seen[waitpoint_id] = waitpoint.signal_count
      end
      for _, member in ipairs(page) do
        local number, packed = string.match(member, '^[^:]+:(%d+):(.*)$')
        local intact, fields = pcall(cmsgpack.unpack, packed or '')
        seen[waitpoint_id] = tonumber(number) or waitpoint.signal_count
        if intact and type(fields) == 'table' and fields[1] then
          local signal = {
            waitpoint_id = waitpoint_id, signal_id = fields[1], signal_name = fields[2], correlation_id = fields[3],
            source_type = fields[4], source_identity = fields[5],
          }
          if apply_signal(tree, signal) == 'resume_condition_satisfied' then
            return true, true
          end
        end
        if tree.steps >= MAX_STEPS then
          return false, false
        end
      end
    end
  end
  return false, true
end

-- The waitpoints of a condition whose leaves name them by their tokens, a list in which each has its id. Or nil and the
-- refusal. In the condition the ids take the places of the tokens.
local function find_waitpoints(execution, condition, first_leaf)
  local digests, kids = {}, {}
  for at = first_leaf, #condition, 4 do
    local token = condition[at + 1]
    local kid = string.match(token, '^[^:]+') or ''
    if kids[kid] == nil then
      kids[kid] = usable_kid(execution, kid) and true or false
    end
    if not kids[kid] then
      return nil, ff.err('invalid_token')
    end
    digests[#digests + 1] = redis.sha1hex(token)
  end
  -- Only a token that ff_create_waitpoint has made is known here.
  local named = ff.hash_fields(ff.execution_key(execution, 'tokens'), digests)
  local ids, is_listed = {}, {}
  for j, digest in ipairs(digests) do
    local waitpoint_id = named[digest]
    if not waitpoint_id then
      return nil, ff.err('invalid_token')
    end
    condition[first_leaf + 4 * j - 3] = waitpoint_id
    if not is_listed[waitpoint_id] then
      is_listed[waitpoint_id] = true
      ids[#ids + 1] = waitpoint_id
    end
  end
  local texts = ff.hash_fields(ff.execution_key(execution, 'waitpoints'), ids)
  local waitpoints = {}
  for i, waitpoint_id in ipairs(ids) do
    local waitpoint = parse_waitpoint(texts[waitpoint_id])
    if not waitpoint then
      return nil, ff.err('invalid_token')
    end
    if not is_pending(execution, waitpoint) then
      return nil, ff.err('waitpoint_closed')
    end
    waitpoint.id = waitpoint_id
    waitpoints[i] = waitpoint
  end
  return waitpoints
end

-- Gives waitpoints to a suspension: they take no other, and are closed with it.
local function take_waitpoints(execution, waitpoints, suspension_id)
  local flat = {}
  for _, waitpoint in ipairs(waitpoints) do
    waitpoint.suspension_id = suspension_id
    flat[#flat + 1], flat[#flat + 2] = waitpoint.id, waitpoint_text(waitpoint)
  end
  ff.write_list('HSET', ff.execution_key(execution, 'waitpoints'), flat)
end

-- The open suspension as a field list: what it waits for, without what has contributed to it. `waits:<n>` are kind and
-- matcher of its leaves, each once; `needed` and `received` are how many contributions the root needs and has. A
-- condition of more than `most_bytes` is left out.
function ff.describe_suspension(execution, most_bytes)
  local key = ff.execution_key(execution, 'suspension')
  local names = { 'suspension_id', 'attempt_index', 'created_at', 'timeout_behavior', 'reason' }
  local flat, ids, told, waits = {}, {}, {}, 0
  for name, value in pairs(ff.hash_fields(key, names)) do
    flat[#flat + 1], flat[#flat + 2] = name, value
  end
  local packed, node_count, received = unpack(redis.call('HMGET', key, 'condition', 'node_count', 'got:0'))
  local condition = most_bytes and #(packed or '') > most_bytes and {} or stored_condition(packed)
  for at = 3 * (ff.integer(node_count) or 0) + 1, #condition, 4 do
    ids[#ids + 1] = condition[at + 1]
    local wait = (condition[at + 2] or '') .. ' ' .. (condition[at + 3] or '')
    if not told[wait] then
      told[wait], waits = true, waits + 1
      flat[#flat + 1], flat[#flat + 2] = 'waits:' .. waits, wait
    end
  end
  flat[#flat + 1], flat[#flat + 2] = 'waitpoint_ids', table.concat(ids, ' ')
  flat[#flat + 1], flat[#flat + 2] = 'needed', ff.text(ff.integer(condition[2]) or 1)
  flat[#flat + 1], flat[#flat + 2] = 'received', ff.text(ff.integer(received) or 0)
  return flat
end

-- ff_suspend_execution
--   keys:    core
--   args:    attempt_index lease_id lease_epoch last_id suspension_id timeout_ms timeout_behavior reason node_count
--            condition...
--   returns: kind suspension_id
--   errors:  execution_not_found stale_owner state_lost suspended execution_not_active lease_expired sequence_gap
--            waitpoint_closed invalid_token invalid_input
--
-- The condition: for each node `parent needed distinct`, then for each leaf `node token kind matcher`. Signals that
-- came before the suspension count. Where they already meet the condition the status is ALREADY_SATISFIED, the
-- waitpoints are closed, and the lease is kept; the same suspension_id again answers the same. The status is MORE where
-- there are more of these signals than one call may apply: the execution is still active, and the same call again goes
-- on. timeout_ms 0 is none.
redis.register_function('ff_suspend_execution', function(keys, args)
  local call = redis.call
  local core_key = keys[1]
  local attempt_index, lease_id, lease_epoch, last_id, suspension_id, timeout_ms, timeout_behavior, reason,
    node_count = unpack(args, 1, 9)
  timeout_ms, node_count = ff.integer(timeout_ms), ff.integer(node_count)
  if not timeout_ms or not node_count or node_count < 1 or node_count > MAX_NODES then
    return ff.err('invalid_input', 'suspension')
  end
  local condition, first_leaf = {}, 3 * node_count + 1
  for i = 10, #args do
    condition[i - 9] = args[i]
  end
  local leaf_count = (#condition - first_leaf + 1) / 4
  if leaf_count < 1 or leaf_count > MAX_LEAVES or leaf_count % 1 ~= 0 then
    return ff.err('invalid_input', 'condition')
  end
  local execution, reply = ff.load_releasable(core_key, attempt_index, lease_id, lease_epoch, 'suspended', last_id)
  if not execution then
    return reply
  end
  local key, refs_key = ff.execution_key(execution, 'suspension'), ff.execution_key(execution, 'suspension_signals')
  local earlier, closed_at = unpack(call('HMGET', key, 'suspension_id', 'closed_at'))
  if earlier == suspension_id and closed_at then
    return ff.reply('ALREADY_SATISFIED', 'suspended', suspension_id)
  end
  local waitpoints, refusal = find_waitpoints(execution, condition, first_leaf)
  if not waitpoints then
    return refusal
  end
  ff.expect('signals_buffered', ff.execution_key(execution, 'signals_buffered'))
  ff.expect('suspension_signals', refs_key)
  ff.expect('waitpoint_use', ff.key('waitpoint_use', execution.slot_tag))

  local goes_on = earlier == suspension_id
  local tree, seen = tree_of(key, condition, node_count, not goes_on), {}
  if not tree then
    return ff.err('invalid_input', 'condition')
  end
  local seen_names = {}
  for i, waitpoint in ipairs(waitpoints) do
    seen_names[i] = 'seen:' .. waitpoint.id
  end
  local stored = goes_on and ff.hash_fields(key, seen_names) or {}
  for i, waitpoint in ipairs(waitpoints) do
    seen[waitpoint.id] = ff.integer(stored[seen_names[i]]) or 0
  end
  local met, all = apply_buffered(execution, tree, waitpoints, seen)

  if not goes_on then
    -- An earlier suspension may have had 10,000 signals: UNLINK frees them outside of the call.
    call('UNLINK', key, refs_key)
    call('HSET', key, 'suspension_id', suspension_id, 'attempt_index', attempt_index, 'created_at',
      ff.text(execution.now), 'timeout_behavior', timeout_behavior, 'reason', reason, 'node_count',
      ff.text(node_count), 'condition', cmsgpack.pack(condition))
  end
  save_tree(execution, tree)
  if not all then
    local places = {}
    for i, waitpoint in ipairs(waitpoints) do
      places[2 * i - 1], places[2 * i] = seen_names[i], ff.text(seen[waitpoint.id])
    end
    ff.write_list('HSET', key, places)
    return ff.reply('MORE', 'suspended', suspension_id)
  end
  take_waitpoints(execution, waitpoints, suspension_id)
  if met then
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

-- The fields of a signal, in the order in which ff_deliver_signal stores them.
local SIGNAL_FIELDS = {
  'signal_id', 'waitpoint_id', 'signal_name', 'signal_category', 'source_type', 'source_identity', 'correlation_id',
  'accepted_at', 'effect', 'payload',
}

-- The values of a stored signal, `<waitpoint id>:<signal id>`; nil without one. A signal that goes to two waitpoints is
-- stored twice.
local function stored_signal(execution, ref)
  local packed = redis.call('HGET', ff.execution_key(execution, 'signals'), ref)
  local intact, values = pcall(cmsgpack.unpack, packed or '')
  return packed and intact and type(values) == 'table' and values or nil
end

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
  local waitpoints_key = ff.execution_key(execution, 'waitpoints')
  local waitpoint = parse_waitpoint(call('HGET', waitpoints_key, waitpoint_id))
  if not token_is_valid(execution, waitpoint_id, waitpoint, token) then
    return ff.err('invalid_token')
  end
  local ref = waitpoint_id .. ':' .. signal_id
  local dedup_key = ff.execution_key(execution, 'signals_dedup')
  local dedup_field = #idempotency_key > 0 and waitpoint_id .. ' ' .. idempotency_key or nil
  local earlier = stored_signal(execution, dedup_field and call('HGET', dedup_key, dedup_field) or ref)
  if earlier then
    return ff.reply('DUPLICATE', earlier[1], earlier[9])
  end
  local key = ff.execution_key(execution, 'suspension')
  local suspension = ff.hash_fields(key, { 'suspension_id', 'node_count', 'condition' })
  local open = execution.state == 'suspended' and suspension.suspension_id == waitpoint.suspension_id
  if not open and not is_pending(execution, waitpoint) then
    return ff.err('waitpoint_closed')
  end
  if waitpoint.signal_count >= MAX_SIGNALS then
    return ff.err('signal_limit_exceeded')
  end
  local signal = {
    signal_id = signal_id, waitpoint_id = waitpoint_id, signal_name = signal_name, source_type = source_type,
    source_identity = source_identity, correlation_id = correlation_id,
  }
  local effect, tree = 'buffered_for_pending_waitpoint', nil
  local buffered_key = ff.execution_key(execution, 'signals_buffered')
  if open then
    tree = tree_of(key, stored_condition(suspension.condition), ff.integer(suspension.node_count) or 0, false)
    if not tree then
      ff.corrupt('suspension')
    end
    effect = apply_signal(tree, signal)
    ff.expect('suspension_signals', ff.execution_key(execution, 'suspension_signals'))
    if effect == 'resume_condition_satisfied' then
      ff.check_move(execution)
    end
  else
    ff.expect('signals_buffered', buffered_key)
  end

  waitpoint.signal_count = waitpoint.signal_count + 1
  call('HSET', waitpoints_key, waitpoint_id, waitpoint_text(waitpoint))
  local values = {
    signal_id, waitpoint_id, signal_name, signal_category, source_type, source_identity, correlation_id,
    ff.text(execution.now), effect, has_payload == '1' and payload or nil,
  }
  call('HSET', ff.execution_key(execution, 'signals'), ref, cmsgpack.pack(values))
  if dedup_field then
    call('HSET', dedup_key, dedup_field, ref)
  end
  if tree then
    save_tree(execution, tree)
  else
    local looked_at = cmsgpack.pack({ signal_id, signal_name, correlation_id, source_type, source_identity })
    call('ZADD', buffered_key, 0, buffered_place(waitpoint_id, waitpoint.signal_count) .. ':' .. looked_at)
  end
  if effect == 'resume_condition_satisfied' then
    ff.close_suspension(execution, 'resumed')
    ff.move(execution, 'waiting', 'resumed')
  end
  return ff.with_hints(ff.ok(signal_id, effect), execution.hints)
end)

-- ff_observe_signals
--   keys:    core
--   args:    attempt_index lease_id lease_epoch offset max_bytes
--   returns: signals next_offset
--   errors:  execution_not_found stale_owner state_lost suspended execution_not_active lease_expired
--            invalid_input
--
-- The signals, as field lists, that met the condition of the suspension after which this lease was granted: from
-- `offset` on, until they hold max_bytes. next_offset is '' after the last.
redis.register_function({
  function_name = 'ff_observe_signals',
  callback = function(keys, args)
    local core_key = keys[1]
    local attempt_index, lease_id, lease_epoch, offset, max_bytes = unpack(args, 1, 5)
    offset, max_bytes = ff.integer(offset), ff.integer(max_bytes)
    if not offset or not max_bytes then
      return ff.err('invalid_input', 'offset')
    end
    local execution, refusal = ff.load_owned(core_key, attempt_index, lease_id, lease_epoch)
    if not execution then
      return refusal
    end
    local suspension = ff.hash_fields(ff.execution_key(execution, 'suspension'), { 'attempt_index', 'close_reason' })
    local signals, bytes = {}, 0
    if suspension.attempt_index ~= attempt_index or suspension.close_reason ~= 'resumed' then
      return ff.ok(signals, '')
    end
    local refs = redis.call('LRANGE', ff.execution_key(execution, 'suspension_signals'), offset, offset + PAGE - 1)
    for i, ref in ipairs(refs) do
      local values, flat = stored_signal(execution, ref), {}
      if not values then
        ff.corrupt('signals')
      end
      for j, name in ipairs(SIGNAL_FIELDS) do
        if values[j] then
          flat[#flat + 1], flat[#flat + 2] = name, values[j]
          bytes = bytes + #values[j]
        end
      end
      signals[#signals + 1] = flat
      if bytes >= max_bytes and i < #refs then
        return ff.ok(signals, ff.text(offset + i))
      end
    end
    return ff.ok(signals, #refs == PAGE and ff.text(offset + PAGE) or '')
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
    ff.clear_timers(execution, 'suspension')
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
