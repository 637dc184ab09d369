-- Frames of one attempt. A batch carries the writer, the sequence of the frame before it and then blocks, each of which
-- begins with its letter:
--
--   L count payload*count
--       log frames: one entry a frame
--   X count extra_count (field value)*extra_count payload*count
--       the same with more fields, which every frame of the block has
--   V count value
--       one live entry that stands for `count` frames: a payload, or a run (ff_fast/_hot/frames.pyx) of several
--   W count extra_count (field value)*extra_count value
--       the same with more fields
--   S count extra_count (field value)*extra_count value pending_field base_version
--       as W, and the value is kept in the summary as well: `count` patches on top of document version `base_version`,
--       under `pending_field`, which is `run:<version after>:<count>:<kind>` (`patch:` for one)
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

-- How many arguments a block has behind its letter, at the least.
local BLOCK_FIXED = { L = 2, X = 3, V = 2, W = 3, S = 5, C = 3, T = 1, P = 1, K = 1, E = 1, H = 1 }
-- The stream that the block's frames go to: to the log as an entry each, to the live window as one entry.
local FRAMES = { L = 'log', X = 'log', V = 'live', W = 'live', S = 'live' }
local HAS_EXTRAS = { X = true, W = true, S = true }
-- The stream that another block is about.
local CARE = { K = 'log', T = 'live', P = 'live' }
local MAX_PAYLOAD, MAX_FRAMES, MAX_INTEGER, integer = ff.MAX_PAYLOAD, ff.MAX_FRAMES, ff.MAX_INTEGER, ff.integer

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

-- The frames of a batch as its blocks: for each the letter, the count, the first field, the first payload and the next
-- block. Only for blocks that were checked.
local function block_at(args, at)
  local letter, count = args[at], tonumber(args[at + 1])
  local from = at + 2
  if HAS_EXTRAS[letter] then
    from = at + 3 + 2 * tonumber(args[at + 2])
  end
  local after = from + (FRAMES[letter] == 'log' and count or 1)
  return letter, count, at + 3, from, letter == 'S' and after + 2 or after
end

-- How many summary patches are among the first `skip` frames of a batch that holds more, or nil where a run that
-- would have to be cut is not what its block says.
local function skipped_patches(args, skip)
  local at, patches = 3, 0
  while skip > 0 do
    local letter = args[at]
    if FRAMES[letter] then
      local _, count, _, from, after = block_at(args, at)
      if skip < count and FRAMES[letter] == 'live' and not run_suffix(args[from], count, skip) then
        return nil
      end
      if letter == 'S' then
        patches = patches + math.min(skip, count)
      end
      skip = skip - count
      at = after
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
    return integer(ms) and integer(sequence)
  elseif letter == 'E' then
    return #value <= 32 and string.find(value, '^%d+%.?%d*$')
  end
  local number = integer(value)
  if letter == 'H' then
    return number or value == ''
  end
  return number and number > 0
end

-- The id under which a stored frame stands, with 0 for its time once it is trimmed. Only a caller that repeats an old frame
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
          if entry[2][i] == 'run' then
            first = last - ff.run_count(entry[2][i + 1]) + 1
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
  return '0-' .. ff.text(sequence)
end

-- The core key of the attempt that has this meta key, and its other keys. They share its slot.
local function keys_beside(meta_key)
  local tag, id, index = string.match(meta_key, '^ff:stream:(%b{}):(.+):(%d+):meta$')
  local x = { tag = tag or '', id = id or '' }
  return 'ff:exec:' .. x.tag .. ':' .. x.id .. ':core', ff.attempt_keys(x, index or '')
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
--   keys:    meta stream live summary
--   args:    writer previous_sequence block...
--   returns: position
--   errors:  execution_not_found stale_owner suspended stream_closed lease_expired writer_superseded sequence_gap summary_conflict payload_too_large invalid_input
--
-- Each key costs the server time, so a batch names the ones that it needs: two, three or four. With two all its blocks
-- go to one stream, which is `stream`, log or live window; with more, `stream` is the log. The core is looked at where
-- the batch is refused, and both streams where it was stored before: those keys are spelled from the meta key, and
-- share its slot.
--
-- position is one string: the id of the last frame, server time in ms, when the lease ends in ms, and 1 where a cancel
-- was requested, else 0. One string costs the server less than a list of four.
--
-- Times in ms have 13 digits from 2001 to 2286, so as texts they compare as they do as numbers, and the sequence of an
-- id begins at its 15th byte: each conversion between text and number costs as much as a field.
redis.register_function('ff_append', function(keys, args)
  local call, format, sub = redis.call, string.format, string.sub
  if not keys[2] then
    return ff.err('invalid_input', 'keys')
  end
  local meta = call('HMGET', keys[1], 'writer', 'last_id', 'lease_expires_at', 'cancel_requested')
  if not meta[1] or meta[1] ~= args[1] then
    return refusal(keys_beside(keys[1]), keys[1], args[1] or '')
  end
  local time = call('TIME')
  local now, expires = format('%d', time[1] * 1000 + time[2] / 1000), meta[3]
  if not expires or (#expires == 13 and now >= expires) or (#expires ~= 13 and (tonumber(expires) or 0) <= now + 0) then
    return refusal(keys_beside(keys[1]), keys[1], args[1])
  end

  -- Check every block before the first write.
  local total, patches, summary_first, compaction, stream, mixed = 0, 0, nil, nil, nil, false
  local at, last = 3, #args
  while at <= last do
    local letter = args[at]
    local fixed = BLOCK_FIXED[letter]
    if not fixed or at + fixed > last then
      return ff.err('invalid_input', 'block')
    end
    local frames = FRAMES[letter]
    local about = frames or CARE[letter]
    if about then
      mixed = mixed or (stream and stream ~= about)
      stream = about
    end
    if frames then
      local count, from = args[at + 1], at + 2
      count = count == '1' and 1 or integer(count)
      if not count or count < 1 then
        return ff.err('invalid_input', 'block')
      end
      if HAS_EXTRAS[letter] then
        local extras = integer(args[from])
        if not extras or extras > ff.MAX_FIELDS then
          return ff.err('invalid_input', 'block')
        end
        from = from + 1 + 2 * extras
      end
      local limit = MAX_PAYLOAD
      if frames == 'log' then
        at = from + count
      else
        at = from + 1
        if count > 1 then
          limit = ff.MAX_RUN_BYTES
        end
      end
      if at > last + 1 then
        return ff.err('invalid_input', 'block')
      end
      for i = from, at - 1 do
        if #args[i] > limit then
          return ff.err('payload_too_large', ff.text(limit), ff.text(#args[i]))
        end
      end
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
        compaction = integer(args[at + 1])
        if not compaction or compaction < 1 or (summary_first and compaction ~= summary_first + patches) then
          return ff.err('invalid_input', 'block')
        end
      elseif not retention_ok(letter, args[at + 1]) then
        return ff.err('invalid_input', 'block')
      end
      at = at + fixed + 1
    end
  end
  if total > MAX_FRAMES then
    return ff.err('invalid_input', 'frames')
  end
  if ((summary_first or compaction) and not keys[4]) or (mixed and not keys[3]) then
    return ff.err('invalid_input', 'keys')
  end

  -- After the last stored frame the batch appends; from an older one of this writer it is a duplicate; else a gap.
  local last_id = meta[2]
  local sequence, skip, skipped = args[2], 0, 0
  if sequence == sub(last_id, 15) then
    sequence = sequence + 0
  else
    local _, stored = ff.split_id(last_id)
    sequence = integer(sequence)
    if not sequence then
      return ff.err('invalid_input', 'previous_sequence')
    end
    skip = stored - sequence
    if skip < 0 or sequence + 1 < tonumber(call('HGET', keys[1], 'writer_base')) then
      return ff.err('sequence_gap', ff.text(stored + 1), ff.text(sequence + 1))
    end
    if skip >= total then
      local _, beside = keys_beside(keys[1])
      return stored_id(beside.log, beside.live, sequence + total) .. ' ' .. now .. ' ' .. expires .. (meta[4] and ' 1' or ' 0')
    end
    skipped = skipped_patches(args, skip)
    if not skipped then
      return ff.err('invalid_input', 'block')
    end
  end
  if sequence + total > MAX_INTEGER then
    return ff.err('invalid_input', 'previous_sequence')
  end
  local summary
  if summary_first or compaction then
    summary = call('HMGET', keys[4], 'version', 'first_applied_ms')
    local version = tonumber(summary[1] or 0)
    -- Patches that an overlap leaves out are in the stored version already.
    local expected = summary_first and summary_first + skipped or compaction
    if version ~= expected then
      return ff.err('summary_conflict', ff.text(version), ff.text(expected))
    end
  end

  local log, live = keys[2], keys[3] or keys[2]
  local ms, id = sub(last_id, 1, 13), last_id
  if now > ms then
    ms = now
  end
  at = 3
  while at <= last do
    local letter = args[at]
    local frames = FRAMES[letter]
    if frames then
      local count, from, first_extra = args[at + 1], at + 2, at + 3
      count = count == '1' and 1 or count + 0
      local extras = HAS_EXTRAS[letter]
      if extras then
        from = first_extra + 2 * args[at + 2]
      end
      local last_extra = from - 1
      if frames == 'log' then
        at = from + count
        if skip > 0 then
          local left_out = math.min(skip, count)
          from, sequence, skip = from + left_out, sequence + left_out, skip - left_out
        end
        -- The id of one frame that becomes an entry of its own; then the server counts on: one text less a frame.
        local next_id = format('%s-%d', ms, sequence + 1)
        -- In this order, or a sum beyond 2^53 would be rounded.
        sequence = sequence + (at - from)
        id = next_id
        if at - from > 1 then
          id = format('%s-%d', ms, sequence)
        end
        if extras then
          for i = from, at - 1 do
            call('XADD', log, next_id, 'payload', args[i], unpack(args, first_extra, last_extra))
            next_id = ms .. '-*'
          end
        elseif from < at then
          call('XADD', log, next_id, 'payload', args[from])
          next_id = ms .. '-*'
          for i = from + 1, at - 1 do
            call('XADD', log, next_id, 'payload', args[i])
          end
        end
      else
        local name, value, kept = 'payload', args[from], count
        if count > 1 then
          name = 'run'
        end
        sequence = sequence + count
        id = format('%s-%d', ms, sequence)
        if skip >= count then
          kept, skip = 0, skip - count
        elseif skip > 0 then
          value, kept, skip = run_suffix(value, count, skip), count - skip, 0
          -- `prev` belongs to the first frame.
          local entry = { name, value }
          for i = first_extra, last_extra, 2 do
            if args[i] ~= 'prev' then
              entry[#entry + 1], entry[#entry + 2] = args[i], args[i + 1]
            end
          end
          call('XADD', live, id, unpack(entry))
        elseif extras then
          call('XADD', live, id, name, value, unpack(args, first_extra, last_extra))
        else
          call('XADD', live, id, name, value)
        end
        at = from + 1
        if letter == 'S' then
          if kept > 0 then
            local version, pending_field = args[at + 1] + count, args[at]
            if kept < count then
              pending_field = string.gsub(pending_field, '^(run:%d+:)%d+', '%1' .. ff.text(kept))
            end
            call('HSET', keys[4], pending_field, value, 'version', ff.text(version), 'last_updated_ms', now, 'cursor', id)
            if not summary[2] then
              summary[2] = now
              call('HSET', keys[4], 'first_applied_ms', now)
            end
          end
          at = at + 2
        end
      end
    elseif letter == 'C' then
      local fields = call('HMGET', keys[4], 'version', 'last_updated_ms', 'first_applied_ms', 'cursor')
      call('DEL', keys[4])
      call('HSET', keys[4], 'document', args[at + 2], 'document_version', args[at + 1], 'version', fields[1],
        'last_updated_ms', fields[2], 'first_applied_ms', fields[3], 'cursor', fields[4], 'patch_kind', args[at + 3])
      at = at + 4
    elseif letter == 'T' then
      call('XTRIM', live, 'MINID', '~', args[at + 1])
      at = at + 2
    elseif letter == 'P' then
      call('PEXPIRE', live, args[at + 1])
      at = at + 2
    elseif letter == 'K' then
      call('XTRIM', log, 'MAXLEN', '~', args[at + 1])
      at = at + 2
    elseif letter == 'H' then
      if args[at + 1] == '' then
        call('HDEL', keys[1], 'visible_sequence')
      else
        call('HSET', keys[1], 'visible_sequence', args[at + 1])
      end
      at = at + 2
    else
      call('HSET', keys[1], 'estimator', args[at + 1])
      at = at + 2
    end
  end
  if total > 0 then
    call('HSET', keys[1], 'last_id', id)
  end
  return id .. ' ' .. now .. ' ' .. expires .. (meta[4] and ' 1' or ' 0')
end)

-- ff_open_writer
--   keys:    core meta summary
--   args:    writer
--   returns: last_id visible_sequence estimator summary_version
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
  local meta = call('HMGET', keys[2], 'last_id', 'visible_sequence', 'estimator', 'writer')
  local version = call('HGET', keys[3], 'version') or '0'
  local _, sequence = ff.split_id(meta[1])
  if meta[4] ~= args[1] then
    call('HSET', keys[2], 'writer', args[1], 'writer_base', ff.text(sequence + 1))
  end
  return ff.ok(meta[1], meta[2] or ff.text(sequence), meta[3] or '', version)
end)
