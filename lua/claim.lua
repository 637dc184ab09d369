-- Claim: one call picks the best execution of one lane and partition that requires certain capabilities. The client
-- asks for those that its worker has. The hints that lead to such a call are in the slot of the lane.

local PAGE = 64
-- A call takes no more members out of an index than this, at about 4 us each.
local DROP_LIMIT = 256
-- Sets of required capabilities that a lane remembers. A forgotten one is registered again with its next hint.
local NEEDS_LIMIT = 1024
-- Workers that wait look at the registry once in this time by themselves.
local NEWS_MS = '60000'

-- The tokens of `required`, a comma-separated list, that are not in the set `offered`; comma-separated.
local function missing(offered, required)
  local tokens = {}
  for token in string.gmatch(required, '[^,]+') do
    if not offered[token] then
      tokens[#tokens + 1] = token
    end
  end
  return table.concat(tokens, ',')
end

local function head_score(eligible_key)
  return redis.call('ZRANGE', eligible_key, 0, 0, 'WITHSCORES')[2] or ''
end

-- The capabilities of a worker, as a set: args from `first` on.
local function offered_by(args, first)
  local offered = {}
  for i = first, #args do
    offered[args[i]] = true
  end
  return offered
end

-- Refuses the claim where foreign data would stop it behind its first write. With `take_over` the execution is active,
-- and its next attempt is claimed. `known` as in ff.check_move.
function ff.check_claim(execution, known, take_over)
  local fields = execution.fields
  local resumed = not take_over and fields.interrupted == '1'
  ff.check_move(execution, known)
  ff.core_number(execution, 'current_lease_epoch')
  ff.core_number(execution, 'total_attempt_count')
  local index = resumed and fields.current_attempt_index or fields.total_attempt_count
  local attempt_key, meta_key = ff.attempt_key(execution, 'attempt', index), ff.attempt_key(execution, 'meta', index)
  -- A new attempt has neither, and its head replaces what stands under the key.
  if redis.call('EXISTS', attempt_key, meta_key) > 0 then
    ff.expect('attempt', attempt_key)
    ff.expect('meta', meta_key)
  end
  if resumed then
    ff.read_head(ff.attempt_key(execution, 'head', index))
  elseif take_over then
    ff.core_number(execution, 'reclaim_count')
    ff.core_number(execution, 'max_reclaims')
  end
  if not take_over and index ~= '0' then
    local previous = ff.text(tonumber(index) - 1)
    ff.expect('meta', ff.attempt_key(execution, 'meta', previous))
    ff.expect('head', ff.attempt_key(execution, 'head', previous))
  end
end

-- The answer about a lease that is held.
function ff.grant_of(execution, expires_at)
  local fields = execution.fields
  local index = fields.current_attempt_index
  local resumed = fields.lease_continues == '1' or fields.reclaimed == index
  return {
    execution.id, index, fields.current_attempt_id, fields.current_lease_epoch, expires_at,
    resumed and 'resumed' or 'fresh',
  }
end

-- Puts a waiting execution under a lease. An interrupted attempt continues its stream; else a new attempt begins.
-- Returns execution_id attempt_index attempt_id lease_epoch expires_at_ms kind.
function ff.grant_lease(execution, worker_id, worker_instance_id, lease_id, lease_ttl_ms, new_attempt_id)
  local call = redis.call
  local fields, now, lease_digest = execution.fields, execution.now, ff.lease_digest(lease_id)
  local resumed = fields.interrupted == '1'
  local index = resumed and fields.current_attempt_index or fields.total_attempt_count
  local attempt_id = resumed and fields.current_attempt_id or new_attempt_id
  local epoch = ff.text(ff.core_number(execution, 'current_lease_epoch') + 1)
  local attempts = ff.core_number(execution, 'total_attempt_count')
  local expires_at = ff.text(math.min(now + tonumber(lease_ttl_ms), ff.MAX_MS))
  local head_key = ff.attempt_key(execution, 'head', index)
  local head = resumed and ff.read_head(head_key) or { cancel_requested = '0', writer = ff.NO_WRITER }
  ff.set_timer(execution, 'lease', expires_at)
  call('HSET', ff.attempt_key(execution, 'attempt', index), 'attempt_id', attempt_id, 'attempt_index', index,
    'lease_epoch', epoch, 'worker_id', worker_id, 'worker_instance_id', worker_instance_id, 'started_at', ff.text(now))
  if not head.last_id then
    -- Ids of an execution never repeat: each attempt begins in a later millisecond than the last one ended in.
    local began = now
    if index ~= '0' then
      local previous = ff.text(tonumber(index) - 1)
      local last = ff.parse_head(call('GET', ff.attempt_key(execution, 'head', previous)))
      local closed_at = tonumber(call('HGET', ff.attempt_key(execution, 'meta', previous), 'closed_at') or '0')
      local ended = tonumber((ff.split_id(last and last.last_id or '0-0'))) or 0
      began = math.max(now, ended + 1, (closed_at or 0) + 1)
    end
    head.last_id = ff.text(began) .. '-0'
    call('HSET', ff.attempt_key(execution, 'meta', index), 'created_at', ff.text(began))
  end
  if fields.cancel_requested then
    head.cancel_requested = '1'
  end
  head.lease_expires_at = expires_at
  ff.write_head(head_key, head)
  execution.heads[index] = head
  local changes = {
    'current_attempt_index', index, 'current_attempt_id', attempt_id,
    'current_lease_digest', lease_digest, 'current_lease_epoch', epoch, 'lease_ttl_ms', lease_ttl_ms,
    'current_worker_id', worker_id, 'current_worker_instance_id', worker_instance_id,
    'started_at', fields.started_at or ff.text(now),
    'total_attempt_count', ff.text(resumed and attempts or attempts + 1),
  }
  if fields.interrupted then
    -- Most executions are never interrupted, and have neither field.
    local size = #changes
    changes[size + 1], changes[size + 2] = 'interrupted', ''
    changes[size + 3], changes[size + 4] = 'lease_continues', resumed and '1' or ''
  end
  ff.move(execution, 'active', nil, unpack(changes))
  call('HSET', ff.key('leases', execution.slot_tag), lease_digest, execution.id)
  local limit = tonumber(resumed and fields.attempt_left_ms or fields.attempt_timeout_ms) or 0
  if limit > 0 then
    ff.set_timer(execution, 'attempt', now + limit)
  end
  return ff.grant_of(execution, expires_at)
end

-- The active execution of a partition that is under this lease; nil if there is none.
local function held_under(leases_key, lease_id)
  local lease_digest = ff.lease_digest(lease_id)
  local id = redis.call('HGET', leases_key, lease_digest)
  local execution = id and ff.load(ff.key('core', ff.slot_tag_of(leases_key), id))
  if execution and execution.state == 'active' and execution.fields.current_lease_digest == lease_digest then
    return execution
  end
  return nil
end

-- The lease of a call that is made again after a lost reply, with its end; nil where it is not held.
function ff.granted_before(execution)
  local expires_at = execution and ff.lease_expires_at(execution)
  if expires_at and expires_at > execution.now then
    return ff.grant_of(execution, ff.text(expires_at))
  end
  return nil
end

-- The execution that a member of an index names; nil where it names none that waits there and may run. Foreign data in
-- the execution's keys raises an error.
local function member(core_key, needs, eligible_key)
  local execution = ff.load(core_key)
  if execution and execution.state == 'waiting' and execution.fields.required_capabilities == needs then
    -- The index and the leases were read; the first write of a grant is to the timers.
    local known = { timers = true, leases = true, meta = true, head = true }
    known.eligible = execution.fields.lane_id and ff.eligible_key(execution) == eligible_key
    ff.check_claim(execution, known)
    return ff.flow_verdict_of(execution, 'waiting') == 'run' and execution or nil
  end
  return nil
end

-- ff_claim
--   keys:    eligible needs leases timers
--   args:    worker_id worker_instance_id lease_id lease_ttl_ms attempt_id required_capabilities hint_score
--   returns: execution_id attempt_index attempt_id lease_epoch expires_at_ms kind next_score
--   errors:  invalid_input
--
-- With status BEHIND the only value is the score of the best that waits, which is worse than the hint's: another queue
-- may have a better one, and the hint goes back with this score. `hint_score` is '' for a worker that has one queue.
-- next_score is the score of the best execution that stays, '' without one. With status NONE it is the only value: the
-- members looked at could not be claimed and were removed from the index, and where a score says that others stay, the
-- call is made again. One with foreign data in its keys comes back with a timer, as it may have been mended. A call
-- whose lease is held grants it again: it may be repeated.
redis.register_function('ff_claim', function(keys, args)
  local call = redis.call
  local eligible_key, needs_key, leases_key, timers_key = unpack(keys, 1, 4)
  local worker_id, worker_instance_id, lease_id, lease_ttl_ms, attempt_id, required_capabilities, hint_score =
    unpack(args, 1, 7)
  if (ff.integer(lease_ttl_ms) or 0) < 1 then
    return ff.err('invalid_input', 'lease_ttl_ms')
  end
  hint_score = tonumber(hint_score)
  local granted = ff.granted_before(held_under(leases_key, lease_id))
  if granted then
    granted[#granted + 1] = head_score(eligible_key)
    return ff.ok(unpack(granted))
  end
  if required_capabilities ~= '' then
    -- Of another type, it would make every member one that cannot be claimed.
    ff.expect('needs', needs_key)
  end
  local slot_tag, dropped, last = ff.slot_tag_of(eligible_key), 0, 1
  while dropped < DROP_LIMIT do
    -- Most often the first may be claimed, and the second says what stays.
    local page = call('ZRANGE', eligible_key, 0, last, 'WITHSCORES')
    for i = 1, #page, 2 do
      local core_key = ff.key('core', slot_tag, page[i])
      local intact, execution = ff.guarded(member, core_key, required_capabilities, eligible_key)
      if intact and execution then
        if hint_score and tonumber(page[i + 1]) > hint_score then
          return ff.reply('BEHIND', page[i + 1])
        end
        execution.others_wait = page[i + 2] ~= nil
        granted = ff.grant_lease(execution, worker_id, worker_instance_id, lease_id, lease_ttl_ms, attempt_id)
        granted[#granted + 1] = page[i + 3] or head_score(eligible_key)
        return ff.ok(unpack(granted))
      end
      if dropped == 0 and i == 1 then
        ff.expect('timers', timers_key)
      end
      call('ZREM', eligible_key, page[i])
      if not intact then
        call('ZADD', timers_key, ff.text(ff.now_ms() + ff.DEFER_MS), 'eligible:' .. page[i])
      end
    end
    if #page == 0 then
      break
    end
    dropped, last = dropped + #page / 2, PAGE - 1
  end
  local next_score = head_score(eligible_key)
  if next_score == '' then
    ff.forget_queue(slot_tag, ff.owner_in('eligible', eligible_key))
    if required_capabilities ~= '' then
      call('SREM', needs_key, required_capabilities)
    end
  end
  return ff.reply('NONE', next_score)
end)

-- ff_claim_execution
--   keys:    core
--   args:    worker_id worker_instance_id lease_id lease_ttl_ms attempt_id reclaim capability...
--   returns: execution_id attempt_index attempt_id lease_epoch expires_at_ms kind
--   errors:  execution_not_found execution_not_claimable capability_mismatch invalid_input
--
-- Claims one execution by its id. With reclaim '1' an active execution whose lease has lapsed is taken over as well:
-- its old attempt ends as producer_lost, and a new one begins. Where that lapse was one too many, the status is ENDED,
-- and the answer has the hints `(lane_id required_capabilities eligible_score)...` alone. A call whose lease is held
-- grants it again. The execution of a named stream is for ff_open_stream alone.
redis.register_function('ff_claim_execution', function(keys, args)
  local core_key = keys[1]
  local worker_id, worker_instance_id, lease_id, lease_ttl_ms, attempt_id, reclaim = unpack(args, 1, 6)
  if (ff.integer(lease_ttl_ms) or 0) < 1 then
    return ff.err('invalid_input', 'lease_ttl_ms')
  end
  local execution = ff.load(core_key)
  if not execution then
    return ff.err('execution_not_found')
  end
  if execution.state == 'active' and execution.fields.current_lease_digest == ff.lease_digest(lease_id) then
    local granted = ff.granted_before(execution)
    if granted then
      return ff.ok(unpack(granted))
    end
  end
  if ff.is_named(execution) then
    return ff.err('execution_not_claimable', execution.state)
  end
  local lacking = missing(offered_by(args, 7), execution.fields.required_capabilities)
  if lacking ~= '' then
    return ff.err('capability_mismatch', lacking)
  end
  local take_over = reclaim == '1' and execution.state == 'active'
    and ff.lease_expires_at(execution) <= execution.now
  -- A take-over begins a new attempt, so its flow is asked as for an execution that waits.
  if ff.flow_verdict_of(execution, 'waiting') ~= 'run' or not (take_over or execution.state == 'waiting') then
    return ff.err('execution_not_claimable', execution.state)
  end
  ff.check_claim(execution, nil, take_over)
  if take_over then
    ff.lapse(execution)
    if execution.state ~= 'waiting' then
      return ff.with_hints(ff.reply('ENDED'), execution.hints)
    end
  end
  return ff.ok(unpack(ff.grant_lease(execution, worker_id, worker_instance_id, lease_id, lease_ttl_ms, attempt_id)))
end)

-- ff_give_back
--   keys:    leases
--   args:    lease_id
--   returns: given_back (lane_id required_capabilities eligible_score)...
--   errors:
--
-- Undoes a claim whose lease never reached a worker; given_back is 0 where no such lease is held. The execution waits
-- again, as if it had not been claimed: no worker counts as lost, and its next attempt takes the same index. A lease
-- that has lapsed is left to its timer: readers may have been told that its producer is lost, so the attempt cannot
-- begin again.
redis.register_function({
  function_name = 'ff_give_back',
  callback = function(keys, args)
    local call = redis.call
    local leases_key = keys[1]
    local lease_id = args[1]
    local execution = held_under(leases_key, lease_id)
    if not execution or ff.lease_expires_at(execution) <= execution.now then
      return ff.ok('0')
    end
    ff.check_move(execution)
    local fields = execution.fields
    local index = fields.current_attempt_index
    execution.by_holder = true
    local head_key = ff.attempt_key(execution, 'head', index)
    local head = execution.heads[index]
    local _, sequence = ff.split_id(head.last_id)
    if not sequence then
      ff.corrupt('head')
    end
    local begun = fields.lease_continues == '1' or sequence > 0
    head.lease_expires_at = 0
    ff.write_head(head_key, head)
    if begun then
      ff.interrupt_attempt(execution)
    else
      ff.set(execution, 'total_attempt_count', index)
    end
    ff.move(execution, 'waiting', 'given_back')
    if not begun and execution.state == 'waiting' then
      if index == '0' then
        call('HDEL', execution.core_key, 'current_attempt_index', 'current_attempt_id', 'started_at')
      else
        ff.set(execution, 'current_attempt_index', ff.text(tonumber(index) - 1))
      end
    end
    return ff.with_hints(ff.ok('1'), execution.hints)
  end,
  -- It frees what a worker should have, and takes hardly any memory.
  flags = { 'allow-oom' },
})

-- ff_hint
--   keys:    lane_needs ready hinted
--   args:    required_capabilities eligible_score partition mark kept_ms
--   returns:
--   errors:
--
-- Publishes a hint about executions that require capabilities, and registers these with the lane. Where they are new,
-- the workers that wait are woken to learn of them: each waits on the key that is named after the newest entry that it
-- knows.
redis.register_function('ff_hint', function(keys, args)
  local call = redis.call
  local lane_needs_key, ready_key, hinted_key = unpack(keys, 1, 3)
  local required_capabilities, eligible_score, partition, mark, kept_ms = unpack(args, 1, 5)
  -- A key of another type fails before the first write.
  local known = call('ZSCORE', lane_needs_key, required_capabilities)
  call('ZCARD', ready_key)
  call('HLEN', hinted_key)
  -- A score beyond the last exact integer is none of ours.
  local last = call('ZREVRANGEBYSCORE', lane_needs_key, ff.text(ff.MAX_INTEGER), 0, 'WITHSCORES', 'LIMIT', 0, 1)
  local newest = tonumber(last[2] or '0')
  local news_key = ff.key('lane_news', ff.slot_tag_of(lane_needs_key), ff.text(newest))
  ff.expect('lane_news', news_key)
  call('ZADD', ready_key, 'LT', eligible_score, partition)
  call('HSET', hinted_key, partition, mark)
  call('PEXPIRE', hinted_key, kept_ms)
  if known then
    return ff.ok()
  end
  -- Later than every entry before, also where the registry was lost.
  call('ZADD', lane_needs_key, ff.text(math.max(newest + 1, ff.now_ms())), required_capabilities)
  call('ZREMRANGEBYRANK', lane_needs_key, 0, -NEEDS_LIMIT - 1)
  call('ZADD', news_key, '0', 'news')
  call('PEXPIRE', news_key, NEWS_MS)
  return ff.ok()
end)

-- ff_forget_hints
--   keys:    hinted
--   args:    (partition mark)...
--   returns:
--   errors:
--
-- Forgets that there was work in partitions in which the caller found none. A partition with another mark has had a
-- hint meanwhile, and stays.
redis.register_function('ff_forget_hints', function(keys, args)
  local hinted_key = keys[1]
  for i = 1, #args, 2 do
    if redis.call('HGET', hinted_key, args[i]) == args[i + 1] then
      redis.call('HDEL', hinted_key, args[i])
    end
  end
  return ff.ok()
end)
