-- Frames of one attempt. A batch carries the writer, the first sequence and then blocks, each of which begins with its
-- letter:
--
--   L count frame_type payload*count
--       log frames: one entry a frame, fields `frame_type` and `payload`
--   X count frame_type extra_count (field value)*extra_count payload*count
--       the same with more fields, which every frame of the block has
--   V count field_count (field value)*field_count
--       one live entry that stands for `count` frames (a run; its layout is the client's, ff_fast/_hot/frames.pyx)
--   S count field_count (field value)*field_count pending_field base_version
--       as V, and the value of its last field is kept in the summary as well: `count` patches on top of document version
--       `base_version`, under `pending_field`, which is `run:<version after>:<count>:<kind>` (`patch:` for one)
--   C version document patch_kind
--       the whole document at `version`, whose last patch was of that kind; the patches that it holds are dropped
--   T oldest_id
--       the oldest id to keep in the live window
--   P ttl_ms
--       how long the live window lives from now
--   K maxlen
--       how many entries to keep in the log, at the least
--   E estimator
--       the state of the rate estimator, from which a later writer of the attempt continues
--   H visible_sequence
--       the batch ends with best-effort frames, and the last visible frame is this one, 0 for none; or '': from here on
--       the last frame is visible. Sent when it changes
--
-- A frame is visible when a reader that excludes best-effort frames gets it: frames of L, X and S are. The first visible
-- frame after best-effort frames carries `prev`, the sequence of the visible frame before it, so such a reader can
-- tell a hole from frames that it does not want.

--
-- The writer id is `<attempt index>:<lease id>:<lease epoch>:<text>`. It is made in meta under the fence, by
-- `ff_open_writer`, and whatever takes the lease away removes it there in the same call; so an append that finds its
-- writer, and server time before `lease_expires_at`, holds the lease, and reads one hash for it. Only a refused one
-- looks at the core, to say why.

local BLOCK_FIXED = { L = 2, X = 3, V = 2, S = 2, C = 3, T = 1, P = 1, K = 1, E = 1, H = 1 }

-- A run is: varint count, then count varint payload lengths, count varint ages in ms, the payloads back to back.
-- Returns the same run of `count` frames without its first `skip`, or nil where it is no such run.
local function run_suffix(run, count, skip)
  local at = 1
  local function varint()
    local value, scale = 0, 1
    while true do
      -- Behind the end stand zeros, as it were; the size of the whole tells below.
      local byte = string.byte(run, at) or 0
      at = at + 1
      if byte < 128 then
        return value + byte * scale
      end
      value = value + (byte - 128) * scale
      scale = scale * 128
    end
  end
  local function put(value)
    local out = ''
    while value >= 128 do
      out = out .. string.char(value % 128 + 128)
      value = math.floor(value / 128)
    end
    return out .. string.char(value)
  end
  if varint() ~= count then
    return nil
  end
  local size, skipped, lengths_from = 0, 0, at
  for i = 1, count do
    size = size + varint()
    if i == skip then
      skipped, lengths_from = size, at
    end
  end
  local lengths = string.sub(run, lengths_from, at - 1)
  local ages_from = at
  for i = 1, count do
    varint()
    if i == skip then
      ages_from = at
    end
  end
  if at - 1 + size ~= #run then
    return nil
  end
  return put(count - skip) .. lengths .. string.sub(run, ages_from, at - 1) .. string.sub(run, at + skipped)
end

-- The fields of a live entry of `count` frames without its first `skip`.
local function live_suffix(fields, count, skip)
  local kept = {}
  for i = 1, #fields, 2 do
    local name, value = fields[i], fields[i + 1]
    if name == 'run' then
      value = run_suffix(value, count, skip)
    elseif name == 'count' then
      value = ff.text(count - skip)
    end
    -- `prev` belongs to the first frame.
    if name ~= 'prev' then
      kept[#kept + 1] = name
      kept[#kept + 1] = value
    end
  end
  return kept
end

-- How many summary patches are among the first `skip` frames of a batch that holds more, or nil where a run that
-- would have to be cut is not what its block says.
local function skipped_patches(args, skip)
  local at, patches = 3, 0
  while skip > 0 do
    local letter = args[at]
    local count = tonumber(args[at + 1])
    if letter == 'L' then
      at = at + 3 + count
      skip = skip - count
    elseif letter == 'X' then
      at = at + 4 + 2 * tonumber(args[at + 3]) + count
      skip = skip - count
    elseif letter == 'V' or letter == 'S' then
      local value = at + 2 + 2 * tonumber(args[at + 2])
      if skip < count and (args[value - 1] ~= 'run' or not run_suffix(args[value], count, skip)) then
        return nil
      end
      if letter == 'S' then
        patches = patches + math.min(skip, count)
        value = value + 2
      end
      at = value + 1
      skip = skip - count
    else
      at = at + BLOCK_FIXED[letter] + 1
    end
  end
  return patches
end

-- Whether the value of a retention block is one that the server accepts: an error there would come after the frames.
local function retention_ok(letter, value)
  if letter == 'T' then
    local ms, sequence = string.match(value, '^(%d+)%-(%d+)$')
    return ff.integer(ms) and ff.integer(sequence)
  elseif letter == 'E' then
    return #value <= 32 and string.find(value, '^%d+%.?%d*$')
  end
  local number = ff.integer(value)
  if letter == 'H' then
    return number or value == ''
  end
  return number and number > 0
end

-- The id under which a stored frame stands, or '' once it is trimmed. Only a caller that repeats an old frame
-- comes here, so a walk from the end is good enough.
local function stored_id(log, live, sequence)
  for _, stream in ipairs({ log, live }) do
    local to = '+'
    while true do
      local page = redis.call('XREVRANGE', stream, to, '-', 'COUNT', 100)
      local found
      for _, entry in ipairs(page) do
        local ms, last = string.match(entry[1], '^(%d+)-(%d+)$')
        last = tonumber(last)
        local first = last
        for i = 1, #entry[2], 2 do
          if entry[2][i] == 'count' then
            first = last - tonumber(entry[2][i + 1]) + 1
          end
        end
        if last < sequence then
          found = true
          break
        end
        if first <= sequence then
          return ms .. '-' .. ff.text(sequence)
        end
      end
      if found or #page < 100 then
        break
      end
      to = '(' .. page[#page][1]
    end
  end
  return ''
end

-- Why an append with this writer is refused, in the order of the reasons.
local function refusal(core_key, meta_key, writer)
  local index, lease_id, epoch = string.match(writer, '^(%d+):([^:]+):(%d+):.')
  if not index then
    return ff.err('invalid_input', 'writer')
  end
  local core = redis.call(
    'HMGET', core_key, 'state', 'current_attempt_index', 'current_lease_id', 'current_lease_epoch'
  )
  local state = core[1]
  if not state then
    return ff.err('execution_not_found')
  end
  if core[2] ~= index or core[3] ~= lease_id or core[4] ~= epoch then
    return ff.err('stale_owner')
  end
  if state == 'suspended' then
    return ff.err('suspended')
  end
  local meta = redis.call('HMGET', meta_key, 'closed_at', 'lease_expires_at')
  if ff.OUTCOMES[state] or meta[1] then
    return ff.err('stream_closed')
  end
  if state ~= 'active' then
    return ff.err('stale_owner')
  end
  if (tonumber(meta[2]) or 0) <= ff.now_ms() then
    return ff.err('lease_expired')
  end
  return ff.err('writer_superseded')
end

-- ff_append
--   keys:    core meta log live summary
--   args:    writer first_sequence block...
--   returns: position
--   errors:  execution_not_found stale_owner suspended stream_closed lease_expired writer_superseded sequence_gap summary_conflict payload_too_large invalid_input
--
-- `live` and `summary` may be left out by a batch that has no blocks for them: each key costs the server time.
-- position is one string of integers: the ms of the last id, the last sequence, the ms that the lease has left, and
-- 1 where a cancel was requested, else 0. One string costs the server less than a list of four.
redis.register_function('ff_append', function(keys, args)
  local call, format = redis.call, string.format
  if not keys[3] then
    return ff.err('invalid_input', 'keys')
  end
  local meta = call('HMGET', keys[2], 'writer', 'last_sequence', 'last_ms', 'lease_expires_at', 'cancel_requested')
  if not meta[1] or meta[1] ~= args[1] then
    return refusal(keys[1], keys[2], args[1] or '')
  end
  local time = call('TIME')
  -- '%d' drops the fraction of a millisecond wherever this is stored.
  local now = time[1] * 1000 + time[2] / 1000
  local lease_left = (tonumber(meta[4]) or 0) - now
  if lease_left <= 0 then
    return refusal(keys[1], keys[2], args[1])
  end

  -- Check every block before the first write.
  local integer = ff.integer
  local total, summary_first, compaction = 0, nil, nil
  local patches = 0
  local at, last = 3, #args
  while at <= last do
    local letter = args[at]
    local fixed = BLOCK_FIXED[letter]
    if not fixed or at + fixed > last then
      return ff.err('invalid_input', 'block')
    end
    if letter == 'L' or letter == 'X' then
      local from = at + 3
      if letter == 'X' then
        local extras = integer(args[at + 3])
        if not extras or extras > ff.MAX_FIELDS then
          return ff.err('invalid_input', 'block')
        end
        from = at + 4 + 2 * extras
      end
      local count = args[at + 1]
      count = count == '1' and 1 or integer(count)
      if not count or count < 1 then
        return ff.err('invalid_input', 'block')
      end
      at = from + count
      if at > last + 1 then
        return ff.err('invalid_input', 'block')
      end
      for i = from, at - 1 do
        if #args[i] > ff.MAX_PAYLOAD then
          return ff.err('payload_too_large', ff.text(ff.MAX_PAYLOAD), ff.text(#args[i]))
        end
      end
      total = total + count
    elseif letter == 'V' or letter == 'S' then
      local count, fields = integer(args[at + 1]), integer(args[at + 2])
      if not count or count < 1 or not fields or fields < 1 or fields > ff.MAX_FIELDS then
        return ff.err('invalid_input', 'block')
      end
      if #keys < (letter == 'V' and 4 or 5) then
        return ff.err('invalid_input', 'keys')
      end
      local value = at + 2 + 2 * fields
      if value > last then
        return ff.err('invalid_input', 'block')
      end
      local limit = count > 1 and ff.MAX_RUN_BYTES or ff.MAX_PAYLOAD
      if #args[value] > limit then
        return ff.err('payload_too_large', ff.text(limit), ff.text(#args[value]))
      end
      at = value + 1
      if letter == 'S' then
        local base = at + 1 <= last and integer(args[at + 1])
        summary_first = summary_first or base
        if not base or base ~= summary_first + patches or compaction then
          return ff.err('invalid_input', 'block')
        end
        patches = patches + count
        at = at + 2
      end
      total = total + count
    else
      if letter == 'C' then
        if #keys < 5 then
          return ff.err('invalid_input', 'keys')
        end
        compaction = integer(args[at + 1])
        if not compaction or compaction < 1 or (summary_first and compaction ~= summary_first + patches) then
          return ff.err('invalid_input', 'block')
        end
      elseif not retention_ok(letter, args[at + 1]) or (#keys < 4 and (letter == 'T' or letter == 'P')) then
        return ff.err('invalid_input', 'block')
      end
      at = at + fixed + 1
    end
  end
  if total > ff.MAX_FRAMES then
    return ff.err('invalid_input', 'frames')
  end

  -- The next sequence appends, an older one of this writer is a duplicate, a higher one is a gap.
  local sequence, ms = tonumber(meta[2]), tonumber(meta[3])
  local skip, skipped = 0, 0
  if args[2] ~= format('%d', sequence + 1) then
    local first = integer(args[2])
    if not first or first < 1 then
      return ff.err('invalid_input', 'first_sequence')
    end
    skip = sequence + 1 - first
    if skip < 0 or first < tonumber(call('HGET', keys[2], 'writer_base')) then
      return ff.err('sequence_gap', ff.text(sequence + 1), args[2])
    end
    if skip >= total then
      local id = total > 0 and stored_id(keys[3], keys[4], first + total - 1) or ''
      return format('%s %d %d %d', string.match(id, '^%d+') or '0', first + total - 1, lease_left,
        meta[5] and 1 or 0)
    end
    skipped = skipped_patches(args, skip)
    if not skipped then
      return ff.err('invalid_input', 'block')
    end
    sequence = first - 1
  end
  if sequence + total > ff.MAX_INTEGER then
    return ff.err('invalid_input', 'first_sequence')
  end
  local summary
  if summary_first or compaction then
    summary = call('HMGET', keys[5], 'version', 'first_applied_ms')
    local version = tonumber(summary[1] or 0)
    -- Patches that an overlap leaves out are in the stored version already.
    local expected = summary_first and summary_first + skipped or compaction
    if version ~= expected then
      return ff.err('summary_conflict', ff.text(version), ff.text(expected))
    end
  end

  if now > ms then
    ms = now
  end
  at = 3
  while at <= last do
    local letter = args[at]
    if letter == 'L' or letter == 'X' then
      local count, frame_type, from, extras = args[at + 1] + 0, args[at + 2], at + 3, 0
      if letter == 'X' then
        extras = tonumber(args[at + 3])
        from = at + 4 + 2 * extras
      end
      at = from + count
      local first_extra = from - 2 * extras
      if skip > 0 then
        local left_out = math.min(skip, count)
        from, sequence, skip = from + left_out, sequence + left_out, skip - left_out
      end
      -- Behind the first frame of the block the server counts the sequence on by itself: one text less a frame.
      local id = format('%d-%d', ms, sequence + 1)
      sequence = sequence + at - from
      for i = from, at - 1 do
        if extras == 0 then
          call('XADD', keys[3], id, 'frame_type', frame_type, 'payload', args[i])
        else
          call('XADD', keys[3], id, 'frame_type', frame_type, 'payload', args[i],
            unpack(args, first_extra, first_extra + 2 * extras - 1))
        end
        if i == from then
          id = format('%d-*', ms)
        end
      end
    elseif letter == 'V' or letter == 'S' then
      local count, fields = tonumber(args[at + 1]), tonumber(args[at + 2])
      local from, to = at + 3, at + 2 + 2 * fields
      at = to + 1
      sequence = sequence + count
      local id = format('%d-%d', ms, sequence)
      local value, cut = args[to], 0
      if skip >= count then
        skip = skip - count
        count = 0
      elseif skip > 0 then
        local entry = live_suffix({ unpack(args, from, to) }, count, skip)
        call('XADD', keys[4], id, unpack(entry))
        value, cut, skip = entry[#entry], skip, 0
      else
        call('XADD', keys[4], id, unpack(args, from, to))
      end
      if letter == 'S' then
        if count > 0 then
          local version, pending_field = tonumber(args[at + 1]) + count, args[at]
          if cut > 0 then
            pending_field = string.gsub(pending_field, '^(run:%d+:)%d+', '%1' .. ff.text(count - cut))
          end
          call('HSET', keys[5], pending_field, value, 'version', ff.text(version), 'last_updated_ms', ff.text(now),
            'cursor', id)
          if not summary[2] then
            summary[2] = ff.text(now)
            call('HSET', keys[5], 'first_applied_ms', summary[2])
          end
        end
        at = at + 2
      end
    elseif letter == 'C' then
      local kept = call('HMGET', keys[5], 'version', 'last_updated_ms', 'first_applied_ms', 'cursor')
      call('DEL', keys[5])
      call('HSET', keys[5], 'document', args[at + 2], 'document_version', args[at + 1], 'version', kept[1],
        'last_updated_ms', kept[2], 'first_applied_ms', kept[3], 'cursor', kept[4], 'patch_kind', args[at + 3])
      at = at + 4
    elseif letter == 'T' then
      call('XTRIM', keys[4], 'MINID', '~', args[at + 1])
      at = at + 2
    elseif letter == 'P' then
      call('PEXPIRE', keys[4], args[at + 1])
      at = at + 2
    elseif letter == 'K' then
      call('XTRIM', keys[3], 'MAXLEN', '~', args[at + 1])
      at = at + 2
    elseif letter == 'H' then
      if args[at + 1] == '' then
        call('HDEL', keys[2], 'visible_sequence')
      else
        call('HSET', keys[2], 'visible_sequence', args[at + 1])
      end
      at = at + 2
    else
      call('HSET', keys[2], 'estimator', args[at + 1])
      at = at + 2
    end
  end
  if total > 0 then
    call('HSET', keys[2], 'last_sequence', format('%d', sequence), 'last_ms', format('%d', ms))
  end
  return format('%d %d %d %d', ms, sequence, lease_left, meta[5] and 1 or 0)
end)

-- ff_open_writer
--   keys:    core meta summary
--   args:    writer
--   returns: last_sequence last_ms visible_sequence estimator summary_version
--   errors:  execution_not_found stale_owner suspended stream_closed lease_expired invalid_input
--
-- Opening again with the same writer id changes nothing, so a lost reply can be asked for again. An earlier writer of
-- the attempt is superseded.
redis.register_function('ff_open_writer', function(keys, args)
  local call = redis.call
  local refused = refusal(keys[1], keys[2], args[1] or '')
  if refused[2] ~= 'writer_superseded' then
    return refused
  end
  local meta = call('HMGET', keys[2], 'last_sequence', 'last_ms', 'visible_sequence', 'estimator', 'writer')
  local version = call('HGET', keys[3], 'version') or '0'
  if meta[5] ~= args[1] then
    call('HSET', keys[2], 'writer', args[1], 'writer_base', ff.text(tonumber(meta[1]) + 1))
  end
  return ff.ok(meta[1], meta[2], meta[3] or meta[1], meta[4] or '', version)
end)
