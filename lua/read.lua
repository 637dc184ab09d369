-- Reading. Every function here is `no-writes`, so a replica may serve it.

local PAGE = 128
-- A call looks at this many entries of a stream at the most, about 1 us each.
local SCAN_LIMIT = 4096

-- Entries of a stream after an id: those that hold `count` frames, or about `budget` bytes.
-- Returns the entries and, where it stopped before the end, the id up to which it has looked: its sequence, its text.
local function read_after(stream, after, count, budget, exclude)
  local entries, scanned, frames, bytes = {}, 0, 0, 0
  while true do
    local page = redis.call('XRANGE', stream, '(' .. after, '+', 'COUNT', PAGE)
    for _, entry in ipairs(page) do
      after = entry[1]
      scanned = scanned + 1
      local fields, held, size = entry[2], 1, 0
      for i = 1, #fields, 2 do
        local name, value = fields[i], fields[i + 1]
        if name == 'mode' and value == exclude then
          held = 0
          break
        elseif name == 'count' then
          held = tonumber(value)
        end
        size = size + #value
      end
      if held > 0 then
        entries[#entries + 1] = entry
        frames = frames + held
        bytes = bytes + size
      end
      if frames >= count or bytes >= budget or scanned >= SCAN_LIMIT then
        return entries, tonumber(string.match(after, '%d+$')), after
      end
    end
    if #page < PAGE then
      return entries
    end
  end
end

-- ff_read_range
--   keys:    core log live meta
--   args:    attempt_index after_id count max_bytes visibility
--   returns: log_entries live_entries horizon last_sequence last_ms visible_sequence closed_at closed_reason lease_left_ms
--   errors:  execution_not_found attempt_not_found invalid_input
--
-- Both streams after one id, read at one moment. horizon is the id up to which both lists are complete, '' when
-- that is the end of the streams. An attempt is closed by its end, or by the lapse of its lease: nothing can be
-- appended under a lapsed lease, so every reader comes to the same answer by server time. An attempt that nobody has
-- claimed yet reads as empty.
redis.register_function({
  function_name = 'ff_read_range',
  callback = function(keys, args)
    local count, max_bytes = ff.integer(args[3]), ff.integer(args[4])
    local attempt_index = ff.integer(args[1])
    if not attempt_index or not count or count < 1 or not max_bytes then
      return ff.err('invalid_input', 'count')
    end
    local core = redis.call(
      'HMGET', keys[1], 'state', 'current_attempt_index', 'lease_expires_at', 'total_attempt_count'
    )
    if not core[1] then
      return ff.err('execution_not_found')
    end
    local meta = redis.call('HMGET', keys[4], 'last_sequence', 'last_ms', 'visible_sequence', 'closed_at',
      'closed_reason')
    local closed_at, closed_reason, lease_left = meta[4] or '', meta[5] or '', ''
    if not meta[1] then
      local attempts = tonumber(core[4])
      if attempt_index < attempts or attempt_index > attempts then
        return ff.err('attempt_not_found')
      end
      if ff.TERMINAL[core[1]] then
        closed_at, closed_reason = '0', ff.TERMINAL[core[1]]
      end
    elseif closed_at == '' and core[1] == 'active' and core[2] == args[1] then
      local left = core[3] - ff.now_ms()
      lease_left = ff.text(left)
      if left <= 0 then
        closed_at, closed_reason = core[3], 'producer_lost'
      end
    end
    local exclude = args[5] == 'exclude_best_effort' and 'best_effort' or nil
    local log, log_to, horizon = read_after(keys[2], args[2], count, max_bytes, nil)
    local live, live_to, live_horizon = read_after(keys[3], args[2], count, max_bytes, exclude)
    if live_to and not (log_to and log_to <= live_to) then
      horizon = live_horizon
    end
    return ff.ok(
      log, live, horizon or '', meta[1] or '0', meta[2] or '0', meta[3] or '0', closed_at, closed_reason, lease_left
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
