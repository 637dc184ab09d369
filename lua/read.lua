-- Reading. Every function here is `no-writes`, so a replica may serve it.

local PAGE = 128
-- A call looks at this many entries of a stream at the most: 2 us each.
local SCAN_LIMIT = 1024

-- Entries of a stream after an id: those that hold `count` frames, or about `budget` bytes. Entries that are not ours
-- are left out, like best-effort ones of the live window where only the others are wanted: those say their mode.
-- Returns the entries, the id up to which it has looked, and '1' where there may be more behind it, else ''.
local function read_after(stream, after, count, budget, with_mode)
  local entries, scanned, frames, bytes = {}, 0, 0, 0
  while true do
    local page = redis.call('XRANGE', stream, '(' .. after, '+', 'COUNT', PAGE)
    for _, entry in ipairs(page) do
      after = entry[1]
      scanned = scanned + 1
      local fields, ours, mode, held, size = entry[2], false, false, 1, 0
      for i = 1, #fields, 2 do
        local name, value = fields[i], fields[i + 1]
        if name == 'payload' or name == 'end' then
          ours = true
        elseif name == 'run' then
          ours, held = true, ff.run_count(value)
        elseif name == 'mode' then
          mode = true
        end
        size = size + #value
      end
      if ours and (mode or not with_mode) then
        entries[#entries + 1] = entry
        frames = frames + held
        bytes = bytes + size
      end
      if frames >= count or bytes >= budget or scanned >= SCAN_LIMIT then
        return entries, after, '1'
      end
    end
    if #page < PAGE then
      return entries, after, ''
    end
  end
end

-- ff_read_range
--   keys:    core log live meta
--   args:    attempt_index log_after live_after count max_bytes visibility
--   returns: log_entries log_to log_more live_entries live_to live_more last_id visible_sequence closed_reason
--            lease_left_ms
--   errors:  execution_not_found attempt_not_found invalid_input
--
-- Both streams, each after an id of its own, read at one moment up to `log_to` and `live_to`; the `more` of a stream is
-- '1' where it may go on behind. An attempt is closed by its end, or by the lapse of its lease: nothing can be appended
-- under a lapsed lease, so every reader comes to the same answer by server time. An attempt that nobody has claimed yet
-- reads as empty.
redis.register_function({
  function_name = 'ff_read_range',
  callback = function(keys, args)
    local attempt_index, count, max_bytes = ff.integer(args[1]), ff.integer(args[4]), ff.integer(args[5])
    if not attempt_index or not count or count < 1 or not max_bytes then
      return ff.err('invalid_input', 'count')
    end
    local core = redis.call('HMGET', keys[1], 'state', 'current_attempt_index', 'total_attempt_count')
    if not core[1] then
      return ff.err('execution_not_found')
    end
    local meta = redis.call('HMGET', keys[4], 'last_id', 'visible_sequence', 'closed_reason', 'lease_expires_at')
    local closed_reason, lease_left = meta[3] or '', ''
    if not meta[1] then
      -- The next attempt may still come, unless the execution has ended with another one.
      local attempts, ended = tonumber(core[3]), ff.END_REASONS[core[1]]
      if attempt_index ~= attempts or (ended and attempts > 0) then
        return ff.err('attempt_not_found')
      end
      closed_reason = ended or ''
    elseif closed_reason == '' and core[1] == 'active' and core[2] == args[1] then
      local left = (tonumber(meta[4]) or 0) - ff.now_ms()
      lease_left = ff.text(left)
      if left <= 0 then
        closed_reason = 'producer_lost'
      end
    end
    local log, log_to, log_more = read_after(keys[2], args[2], count, max_bytes, false)
    local live, live_to, live_more = read_after(keys[3], args[3], count, max_bytes, args[6] == 'exclude_best_effort')
    local last_id = meta[1] or '0-0'
    local _, sequence = ff.split_id(last_id)
    return ff.ok(
      log, log_to, log_more, live, live_to, live_more, last_id, meta[2] or ff.text(sequence), closed_reason, lease_left
    )
  end,
  flags = { 'no-writes' },
})

-- ff_read_summary
--   keys:    core summary
--   args:
--   returns: (field value)...
--   errors:  execution_not_found
--
-- The document at some version and the patches after it, as stored; the reader folds them.
redis.register_function({
  function_name = 'ff_read_summary',
  callback = function(keys)
    if redis.call('EXISTS', keys[1]) == 0 then
      return ff.err('execution_not_found')
    end
    return { 1, 'OK', redis.call('HGETALL', keys[2]) }
  end,
  flags = { 'no-writes' },
})
