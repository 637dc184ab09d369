-- Reading. Every function here is `no-writes`, so a replica may serve it.

-- Entries of one XRANGE.
local PAGE = 128
-- Where an entry may be large they are few, so that a call reads little more than it answers: as many as have this size
-- together if each is as large as the writers may make it, within bounds.
local PAGE_BYTES, LEAST_PAGE, LARGE_PAGE = 524288, 2, 8
-- A call looks at no more entries of a stream than this, at 2 us each.
local SCAN_LIMIT = 1024
-- The greatest id of a stream, which XRANGE does not take as an exclusive start.
local LAST_ID = '18446744073709551615-18446744073709551615'

local function is_before(id, other)
  local ms, sequence = ff.split_id(id)
  local other_ms, other_sequence = ff.split_id(other)
  ms, other_ms = tonumber(ms), tonumber(other_ms)
  return ms < other_ms or (ms == other_ms and sequence < other_sequence)
end

-- Entries of a stream after an id up to another one, until they hold `count` frames or `max_bytes` bytes; at least one.
-- An entry without a field of ours is left out, as is a run that is too large. With `summary_only` best-effort entries
-- are left out too; a summary entry of the live window has a mode. Returns the entries, the id of the last entry that
-- was looked at, and '1' where more may follow it, else ''.
local function read_between(stream_key, after, to, page_size, count, max_bytes, summary_only)
  local entries, scanned, frames, bytes = {}, 0, 0, 0
  if after == LAST_ID then
    return entries, after, ''
  end
  -- Where an entry may be large, the first one may be all that the answer holds.
  local asked = page_size < PAGE and 1 or page_size
  while true do
    local page = redis.call('XRANGE', stream_key, '(' .. after, to, 'COUNT', asked)
    for _, entry in ipairs(page) do
      after = entry[1]
      scanned = scanned + 1
      local fields, ours, mode, held, size = entry[2], false, false, 1, 0
      for i = 1, #fields, 2 do
        local name, value = fields[i], fields[i + 1]
        if name == 'payload' or name == 'end' or name == 'lost' then
          ours = true
        elseif name == 'run' then
          held = ff.run_count(value)
          ours = held <= ff.MAX_FRAMES and #value <= ff.MAX_RUN_BYTES
          -- Each frame takes a byte or more, so a false count is worth no more than its bytes.
          held = math.min(held, #value)
        elseif name == 'mode' then
          mode = true
        end
        size = size + #value
      end
      if ours and (mode or not summary_only) then
        -- The entry that would exceed the bound is left for the next call.
        if bytes > 0 and bytes + size > max_bytes then
          return entries, entries[#entries][1], '1'
        end
        entries[#entries + 1] = entry
        frames = frames + held
        bytes = bytes + size
      end
      if frames >= count or bytes >= max_bytes or scanned >= SCAN_LIMIT then
        return entries, after, '1'
      end
    end
    if #page < asked then
      return entries, after, ''
    end
    asked = page_size
  end
end

-- Last sequence of an entry, and its time; nil where it is none of ours.
local function place_of(entry)
  for i = 1, #entry[2], 2 do
    local name = entry[2][i]
    if name == 'payload' or name == 'run' or name == 'end' or name == 'lost' then
      local ms, last = ff.split_id(entry[1])
      return last, tonumber(ms)
    end
  end
end

-- The id behind which the frames after `sequence` stand; `after` where it cannot be told. Times rise with sequences, so
-- the time is halved until that of the frame is found: some 20 commands.
local function seek(stream_key, sequence, after)
  local first = redis.call('XRANGE', stream_key, '-', '+', 'COUNT', 1)[1]
  if not first then
    return after
  end
  local newest = redis.call('XREVRANGE', stream_key, '+', '-', 'COUNT', 1)[1]
  local low, high = tonumber((ff.split_id(first[1]))), tonumber((ff.split_id(newest[1]))) + 1
  local found
  while low < high do
    local middle = math.floor((low + high) / 2)
    local entry = redis.call('XRANGE', stream_key, ff.text(middle) .. '-0', '+', 'COUNT', 1)[1]
    local last, ms
    if entry then
      last, ms = place_of(entry)
      if not last then
        return after
      end
    end
    if last and last <= sequence then
      found, low = ms, ms + 1
    else
      high = middle
    end
  end
  -- Later entries of the same time have greater sequences.
  return found and ff.text(found) .. '-' .. ff.text(sequence) or after
end

-- ff_read_range
--   keys:    core log live head
--   args:    attempt_index log_after live_after count max_bytes visibility cursor
--   returns: log_entries log_to log_more live_entries live_to live_more last_id visible_sequence closed_reason
--            lease_left_ms small place payload_limit
--   errors:  execution_not_found attempt_not_found invalid_input
--
-- Both streams, each after an id of its own, read at one moment up to `log_to` and `live_to`. `log_more` and
-- `live_more` are '1' where more entries may follow; where both are, both were read up to the lower one of the two ids,
-- and where the log's alone is, the live window was read no further. `max_bytes` bounds the values of each stream, but
-- for a single larger entry. `small` is '1' where every entry that follows, up to `last_id`, is small (ff.SMALL_LOG,
-- ff.SMALL_LIVE), else ''.
--
-- An attempt is closed by its end, or by the lapse of its lease: nothing can be appended under a lapsed lease, so every
-- reader gets the same answer by server time. An unclaimed attempt reads as empty.
--
-- `cursor` is the id of the frame that the reader had last, or ''; its time may be 0, for any. Where another stream
-- stands in its place, as after a failover, `place` is the id after which the reader continues, and both streams are
-- read after it; else it is ''.
--
-- No payload of the writers so far is larger than `payload_limit`.
redis.register_function({
  function_name = 'ff_read_range',
  callback = function(keys, args)
    local core_key, log_key, live_key, head_key = unpack(keys, 1, 4)
    local attempt_index, log_after, live_after, count, max_bytes, visibility, cursor = unpack(args, 1, 7)
    local index = ff.integer(attempt_index)
    count, max_bytes = ff.integer(count), ff.integer(max_bytes)
    if not index or not count or count < 1 or not max_bytes then
      return ff.err('invalid_input', 'count')
    end
    local state, current_index, attempt_count = unpack(
      redis.call('HMGET', core_key, 'state', 'current_attempt_index', 'total_attempt_count')
    )
    if not state then
      return ff.err('execution_not_found')
    end
    local head = ff.read_head(head_key)
    local last_id = head and head.last_id
    local visible_sequence, closed_reason, large_id, created_at, openings, payload_limit = unpack(redis.call(
      'HMGET', ff.meta_beside(head_key), 'visible_sequence', 'closed_reason', 'large_id', 'created_at',
      'writer_openings', 'payload_limit'
    ))
    closed_reason = closed_reason or ''
    local lease_left = ''
    if not last_id then
      -- The next attempt may still come, unless the execution has ended with another one.
      local attempts, ended = tonumber(attempt_count), ff.END_REASONS[state]
      if index ~= attempts or (ended and attempts > 0) then
        return ff.err('attempt_not_found')
      end
      closed_reason = ended or ''
    elseif closed_reason == '' and state == 'active' and current_index == attempt_index then
      local left = head.lease_expires_at - ff.now_ms()
      lease_left = ff.text(left)
      if left <= 0 then
        closed_reason = 'producer_lost'
      end
    end
    local place = ''
    if last_id and cursor and cursor ~= last_id then
      place = ff.other_place(log_key, live_key, cursor, created_at)
      if place ~= '' then
        log_after, live_after = place, place
      end
    end
    payload_limit = ff.integer(payload_limit) or (openings and ff.USUAL_PAYLOAD or ff.MAX_PAYLOAD)
    -- A cursor that is made of a sequence has no time, so the ids of both streams say nothing about it.
    local sequence = cursor and ff.integer(string.match(cursor, '^0%-(%d+)$') or '')
    if sequence and sequence > 0 and payload_limit <= ff.USUAL_PAYLOAD then
      log_after = log_after == cursor and seek(log_key, sequence, log_after) or log_after
      live_after = live_after == cursor and seek(live_key, sequence, live_after) or live_after
    end
    local large_page = math.max(LEAST_PAGE, math.min(LARGE_PAGE, math.floor(PAGE_BYTES / math.max(payload_limit, 1))))
    local function page_size(after)
      return large_id and is_before(after, large_id) and large_page or PAGE
    end
    local log, log_to, log_more = read_between(
      log_key, log_after, '+', page_size(log_after), count, max_bytes, false
    )
    -- A reader cannot place what stands past the id up to which both streams are known, and would ask for it again.
    local live, live_to, live_more = read_between(
      live_key, live_after, log_more == '1' and log_to or '+', page_size(live_after), count, max_bytes,
      visibility == 'exclude_best_effort'
    )
    local to = log_to
    if live_more == '1' then
      to = live_to
      while #log > 0 and is_before(to, log[#log][1]) do
        log[#log], log_to, log_more = nil, to, '1'
      end
    end
    local small = not (large_id and is_before(to, large_id))
    last_id = last_id or '0-0'
    local _, last_sequence = ff.split_id(last_id)
    return ff.ok(
      log, log_to, log_more, live, live_to, live_more, last_id, visible_sequence or ff.text(last_sequence),
      closed_reason, lease_left, small and '1' or '', place, ff.text(payload_limit)
    )
  end,
  flags = { 'no-writes' },
})

-- ff_read_summary
--   keys:    core summary
--   args:
--   returns: fields
--   errors:  execution_not_found
--
-- One field list: the document at some version and the patches after it, as stored. The reader folds them.
redis.register_function({
  function_name = 'ff_read_summary',
  callback = function(keys)
    local core_key, summary_key = unpack(keys, 1, 2)
    if redis.call('EXISTS', core_key) == 0 then
      return ff.err('execution_not_found')
    end
    return ff.ok(redis.call('HGETALL', summary_key))
  end,
  flags = { 'no-writes' },
})

-- ff_read_state
--   keys:    core
--   args:
--   returns: state attempt_index claimed lapsed closed_reason outcome error failure_class
--   errors:  execution_not_found
--
-- `attempt_index` is the attempt that is open or comes next; where the execution has ended, the one that ended with it.
-- `claimed` is '1' where a worker has claimed that attempt, else ''. `lapsed` is '1' where its lease has lapsed, and
-- nobody has ended it yet. The last four are '' while the execution goes on; `failure_class` is that of a failure.
redis.register_function({
  function_name = 'ff_read_state',
  callback = function(keys)
    local execution = ff.load(keys[1])
    if not execution then
      return ff.err('execution_not_found')
    end
    local state, fields = execution.state, execution.fields
    local attempts = ff.core_number(execution, 'total_attempt_count')
    local ended = ff.END_REASONS[state]
    if not ended then
      local current = state == 'active' or state == 'suspended' or fields.interrupted == '1'
      local lapsed = state == 'active' and ff.lease_expires_at(execution) <= execution.now
      local index = current and fields.current_attempt_index or ff.text(attempts)
      return ff.ok(state, index, current and '1' or '', lapsed and '1' or '', '', '', '', '')
    end
    -- The end of an execution ends the stream of the next attempt where none was open.
    local reason = redis.call('HGET', ff.attempt_key(execution, 'meta', ff.text(attempts)), 'closed_reason')
    local claimed = not reason and attempts > 0
    local index = ff.text(claimed and attempts - 1 or attempts)
    reason = reason or redis.call('HGET', ff.attempt_key(execution, 'meta', index), 'closed_reason') or ended
    return ff.ok(
      state, index, claimed and '1' or '', '', reason, ff.OUTCOMES[state], ff.end_error(execution, reason),
      state == 'failed' and fields.failure_class or ''
    )
  end,
  flags = { 'no-writes' },
})
