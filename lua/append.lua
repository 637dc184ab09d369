-- Frames of attempts. A call has a part for each attempt that it is about, and a part carries a batch: the writer, the
-- sequence of the frame before it, and blocks. A block begins with its letter:
--
--   I  PUSHED_MS    ms
--        only before the first block, which is one of V or W: its frames were pushed under ids of that time, and are
--        stored under it
--   R  REPLAYED_MS  ms later_ms
--        only before the first block: a lost server had its frames under ids of `ms`, and the frames behind it under
--        ids of `later_ms`, and they are stored under these again
--   G  LOST         count
--        the only block of frames of its part: `count` frames were lost with a server, and nobody has them. One entry
--        of the log says so, under the id of the last one
--   L  LOG          count payload*count
--        log frames: one entry a frame
--   X  LOG_FIELDS   count extra_count (field value)*extra_count payload*count
--        log frames with more fields, which every frame of the block has
--   V  LIVE         count value
--        one live entry that stands for `count` frames: a payload, or a run (ff_fast/_hot/frames.pyx) of several
--   W  LIVE_FIELDS  count extra_count (field value)*extra_count value
--        a live entry with more fields
--   S  PATCHES      count extra_count (field value)*extra_count value pending_field base_version
--        as W, and the value is kept in the summary as well: `count` patches on top of document version `base_version`,
--        under `pending_field`, which is `run:<version after>:<count>:<kind>` (`patch:` for one)
--   C  DOCUMENT     version document patch_kind
--        the whole document at `version`, whose last patch was of that kind; the patches that it holds are dropped
--   N  RENEWAL      version document patch_kind
--        as C, whatever version is stored: patches were lost with a server. The part has no other block of the summary
--   T  TRIM_LIVE    oldest_id
--        the oldest id to keep in the live window
--   P  LIVE_TTL     ttl_ms
--        how long the live window lives from now
--   K  TRIM_LOG     maxlen
--        how many entries to keep in the log, at least
--   E  ESTIMATOR    estimator
--        the rate, from which a later writer of the attempt continues, and with blanks between them ttl, floor and
--        ceiling of the live window, for those who look at it
--   H  VISIBLE      visible_sequence
--        the batch ends with best-effort frames, and the last visible frame is this one, 0 for none; or '': the last
--        frame is visible from here on. Sent when it changes
--
-- The first write of a call should be an entry of the first block's stream: where somebody else's entry has an id at or
-- after its own, or the key is no stream, the server refuses that write, and the call with it, with nothing written. So
-- blocks of frames stand first, and a stream that such a write does not prove is asked before.
--
-- A frame is visible when a reader that excludes best-effort frames gets it: frames of L, X and S are. The first
-- visible frame after best-effort frames carries `prev`, the sequence of the visible frame before it, so such a
-- reader can tell a hole from frames that it does not want.
--
-- The writer id is `<attempt index>:<lease digest>:<lease epoch>:<text>`. `ff_open_writer` puts it in the head of the
-- attempt under the fence, and whatever takes the lease away removes it there in the same call. So an append that finds
-- its writer in the head, and server time before `lease_expires_at`, holds the lease, and reads one string for it. Only
-- a refused append reads the core, to say why.

ff.BLOCK = {
  PUSHED_MS = 'I',
  REPLAYED_MS = 'R',
  LOST = 'G',
  LOG = 'L',
  LOG_FIELDS = 'X',
  LIVE = 'V',
  LIVE_FIELDS = 'W',
  PATCHES = 'S',
  DOCUMENT = 'C',
  RENEWAL = 'N',
  TRIM_LIVE = 'T',
  LIVE_TTL = 'P',
  TRIM_LOG = 'K',
  ESTIMATOR = 'E',
  VISIBLE = 'H',
}

local BLOCK = ff.BLOCK
local LOG, LIVE, PATCHES, DOCUMENT, PUSHED_MS = BLOCK.LOG, BLOCK.LIVE, BLOCK.PATCHES, BLOCK.DOCUMENT, BLOCK.PUSHED_MS
local ESTIMATOR, VISIBLE, LOST, RENEWAL = BLOCK.ESTIMATOR, BLOCK.VISIBLE, BLOCK.LOST, BLOCK.RENEWAL
local REPLAYED_MS = BLOCK.REPLAYED_MS
-- The fewest arguments of a block behind its letter.
local FIXED_ARGS = {
  [BLOCK.LOG] = 2, [BLOCK.LOG_FIELDS] = 3, [BLOCK.LIVE] = 2, [BLOCK.LIVE_FIELDS] = 3, [PATCHES] = 5, [DOCUMENT] = 3,
  [LOST] = 1, [RENEWAL] = 3,
  [BLOCK.TRIM_LIVE] = 1, [BLOCK.LIVE_TTL] = 1, [BLOCK.TRIM_LOG] = 1, [BLOCK.ESTIMATOR] = 1, [BLOCK.VISIBLE] = 1,
}
-- The stream of a block's frames. The log has an entry for each frame, or one for all that are lost; the live window
-- has one for the block.
local FRAMES_IN = {
  [BLOCK.LOG] = 'log', [BLOCK.LOG_FIELDS] = 'log', [LOST] = 'log',
  [BLOCK.LIVE] = 'live', [BLOCK.LIVE_FIELDS] = 'live', [PATCHES] = 'live',
}
-- Small numbers by their texts: to look one up costs less than to check and convert the text.
local COUNTS = {}
for number = 1, 128 do
  COUNTS[number .. ''] = number
end
local HAS_FIELDS = { [BLOCK.LOG_FIELDS] = true, [BLOCK.LIVE_FIELDS] = true, [PATCHES] = true }
-- The stream that a block without frames is about.
local RETENTION_OF = { [BLOCK.TRIM_LOG] = 'log', [BLOCK.TRIM_LIVE] = 'live', [BLOCK.LIVE_TTL] = 'live' }
local MAX_PAYLOAD, MAX_FRAMES, MAX_INTEGER, integer = ff.MAX_PAYLOAD, ff.MAX_FRAMES, ff.MAX_INTEGER, ff.integer
local MAX_BATCH_BYTES = ff.MAX_RUN_BYTES
-- Of a call. Its parts have as many entries and bytes together as one of them may have alone.
local MAX_PARTS = 128
-- A client estimates the server's time from its last answer, and the server's clock may be put back.
local MAX_PUSHED_AHEAD_MS = 86400000
-- The kinds of messages on the channel of an attempt.
local PUSH, STORED, NO_WRITER = ff.PUSH, ff.PUSH.STORED, ff.NO_WRITER
local SPACE, PLUS = 32, 43
local SMALL_LOG, SMALL_LIVE = ff.SMALL_LOG, ff.SMALL_LIVE

local function put_varint(value)
  local out = ''
  while value >= 128 do
    out = out .. string.char(value % 128 + 128)
    value = math.floor(value / 128)
  end
  return out .. string.char(value)
end

-- A run is: varint count, then count varint payload lengths, count varint times in ms, the payloads back to back.
-- Returns the same run of `count` frames without its first `skip`, or nil where it is not a run of `count` frames.
local function run_suffix(run, count, skip)
  local at = 1
  local function varint()
    local value, scale = 0, 1
    while true do
      -- Reading past the end yields 0; the size check below rejects such a run.
      local byte = string.byte(run, at) or 0
      at = at + 1
      if byte < 128 then
        return value + byte * scale
      end
      value = value + (byte - 128) * scale
      scale = scale * 128
    end
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
  local times_from = at
  for i = 1, count do
    varint()
    if i == skip then
      times_from = at
    end
  end
  if at - 1 + size ~= #run then
    return nil
  end
  return put_varint(count - skip) .. lengths .. string.sub(run, times_from, at - 1) .. string.sub(run, at + skipped)
end

-- Reads the head of a block of frames that was checked: its letter, its count, the place of its first field, the place
-- of its first payload, and the place of the next block.
local function block_at(args, at)
  local letter, count = args[at], tonumber(args[at + 1])
  local from = at + 2
  if HAS_FIELDS[letter] then
    from = at + 3 + 2 * tonumber(args[at + 2])
  end
  if letter == LOST then
    return letter, count, from, from, from
  end
  local after = from + (FRAMES_IN[letter] == 'log' and count or 1)
  return letter, count, at + 3, from, letter == PATCHES and after + 2 or after
end

-- The number of summary patches among the first `skip` frames of a batch that holds more frames and whose blocks begin
-- at `at`; nil where a run that has to be cut does not hold as many frames as its block says.
local function skipped_patches(args, at, skip)
  local patches = 0
  while skip > 0 do
    local letter = args[at]
    if FRAMES_IN[letter] then
      local _, count, _, from, after = block_at(args, at)
      if skip < count and FRAMES_IN[letter] == 'live' and not run_suffix(args[from], count, skip) then
        return nil
      end
      if letter == PATCHES then
        patches = patches + math.min(skip, count)
      end
      skip = skip - count
      at = after
    else
      at = at + FIXED_ARGS[letter] + 1
    end
  end
  return patches
end

-- Whether the server accepts the value of a block without frames: its error would come after the frames are stored.
local function value_ok(letter, value)
  if letter == BLOCK.TRIM_LIVE then
    local ms, sequence = string.match(value, '^(%d+)%-(%d+)$')
    return integer(ms) and integer(sequence)
  elseif letter == BLOCK.ESTIMATOR then
    local rate = #value <= 96 and string.match(value, '^(%d+%.?%d*)[ %d]*$')
    return rate and #rate <= 32
  end
  local number = integer(value)
  if letter == BLOCK.VISIBLE then
    return number or value == ''
  end
  return number and number > 0
end

-- The id of a stored frame; its time is 0 once the frame is trimmed. Only a repeat of an old frame needs it, so a
-- walk from the end of both streams is fast enough.
local function stored_id(log_key, live_key, sequence)
  for _, stream_key in ipairs({ log_key, live_key }) do
    -- An entry may have 1 MiB, so pages grow only while their entries are small.
    local to, count = '+', 1
    while true do
      local page = redis.call('XREVRANGE', stream_key, to, '-', 'COUNT', count)
      local found, bytes = false, 0
      for _, entry in ipairs(page) do
        local ms, last = string.match(entry[1], '^(%d+)-(%d+)$')
        last = tonumber(last)
        local first = last
        for i = 1, #entry[2], 2 do
          bytes = bytes + #entry[2][i + 1]
          if entry[2][i] == 'run' then
            first = last - ff.run_count(entry[2][i + 1]) + 1
          elseif entry[2][i] == 'lost' then
            first = last - (integer(entry[2][i + 1]) or 1) + 1
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
      if found or #page < count then
        break
      end
      to = '(' .. page[#page][1]
      if bytes < 65536 then
        count = math.min(2 * count, 32)
      end
    end
  end
  return '0-' .. ff.text(sequence)
end

-- Slot tag, execution id and attempt, `<execution id>:<index>`, of a head key.
local function split_head_key(head_key)
  local slot_tag, attempt = string.match(head_key, '^ff:stream:(%b{}):(.+:%d+):head$')
  attempt = attempt or ''
  return slot_tag or '', string.match(attempt, '^(.*):') or '', attempt
end

-- Why an append with this writer is refused, in the order of the reasons. The detail of writer_superseded is the number
-- of openings that this server knows, 0 where no writer is open: a writer that was opened later than that is lost.
local function refusal(core_key, head_key, writer)
  local index, lease_digest, epoch = string.match(writer, '^(%d+):(%x+):(%d+):%S+$')
  if not index or #lease_digest ~= 40 then
    return ff.err('invalid_input', 'writer')
  end
  local state, current_index, current_lease_digest, current_epoch = unpack(redis.call(
    'HMGET', core_key, 'state', 'current_attempt_index', 'current_lease_digest', 'current_lease_epoch'
  ))
  if not state then
    return ff.err('execution_not_found')
  end
  if current_index ~= index or current_lease_digest ~= lease_digest or current_epoch ~= epoch then
    return ff.lost_ownership(epoch, current_epoch)
  end
  if state == 'suspended' then
    return ff.err('suspended')
  end
  local head = ff.read_head(head_key)
  local closed_at, openings = unpack(redis.call('HMGET', ff.meta_beside(head_key), 'closed_at', 'writer_openings'))
  if ff.OUTCOMES[state] or closed_at then
    return ff.err('stream_closed')
  end
  if state ~= 'active' then
    return ff.err('stale_owner')
  end
  if not head or head.lease_expires_at <= ff.now_ms() then
    return ff.err('lease_expired')
  end
  return ff.err('writer_superseded', head.writer ~= ff.NO_WRITER and openings or '0')
end

-- The same for ff_append, which is not given the core key.
local function append_refusal(head_key, writer)
  local slot_tag, id = split_head_key(head_key)
  return refusal(ff.key('core', slot_tag, id), head_key, writer or '')
end

local function bad_block()
  return nil, ff.err('invalid_input', 'block')
end

-- Checks every block from `at` to `last`. Returns the number of frames, the document version before the first patches,
-- the version of a document, RENEWAL for one that replaces whatever is stored, whether the blocks are about both
-- streams, whether an entry will be large, the streams that the first write does not prove (`log`, `live`, `both`, or
-- nil), the numbers of entries and of bytes, and whether a block is about meta; or nil and the refusal.
local function check_blocks(args, at, last)
  local total, entries, bytes, patches, patches_base, document_version = 0, 0, 0, 0, nil, nil
  local stream, mixed, large, frames_ended, unproven, about_meta = nil, false, false, false, nil, false
  local lost = 0
  if args[at] == LOST then
    lost = integer(args[at + 1])
    if not lost or lost < 1 then
      return bad_block()
    end
    at, stream, frames_ended, entries, total, about_meta = at + 2, 'log', true, 1, lost, true
  end
  while at <= last do
    local letter = args[at]
    local fixed = FIXED_ARGS[letter]
    local frames_in = FRAMES_IN[letter]
    if not fixed or at + fixed > last or letter == LOST or (frames_in and lost > 0) then
      return bad_block()
    end
    local about = frames_in or RETENTION_OF[letter]
    if about then
      stream = stream or about
      if stream ~= about then
        mixed, unproven = true, unproven or about
      end
    end
    if frames_in then
      if frames_ended then
        unproven = 'both'
      end
      local count, from = args[at + 1], at + 2
      count = COUNTS[count] or integer(count)
      if not count or count < 1 then
        return bad_block()
      end
      if HAS_FIELDS[letter] then
        local extras = integer(args[from])
        if not extras or extras > ff.MAX_FIELDS then
          return bad_block()
        end
        from = from + 1 + 2 * extras
      end
      local limit, small = MAX_PAYLOAD, SMALL_LOG
      if frames_in == 'log' then
        at = from + count
      else
        at, small = from + 1, SMALL_LIVE
        if count > 1 then
          limit = ff.MAX_RUN_BYTES
        end
      end
      if at > last + 1 then
        return bad_block()
      end
      for i = from, at - 1 do
        local size = #args[i]
        if size > small then
          large = true
          if size > limit then
            return nil, ff.err('payload_too_large', ff.text(limit), ff.text(size))
          end
        end
        bytes = bytes + size
      end
      entries = entries + (at - from)
      if letter == PATCHES then
        local base = at + 1 <= last and integer(args[at + 1])
        patches_base = patches_base or base
        if not base or base ~= patches_base + patches or document_version then
          return bad_block()
        end
        patches = patches + count
        at = at + 2
      end
      total = total + count
    else
      frames_ended = true
      local value = args[at + 1]
      if letter == DOCUMENT then
        local renewed = document_version == RENEWAL
        document_version = integer(value)
        if
          renewed or not document_version or document_version < 1
          or (patches_base and document_version ~= patches_base + patches)
        then
          return bad_block()
        end
      elseif letter == RENEWAL then
        if patches_base or document_version or (integer(value) or 0) < 1 then
          return bad_block()
        end
        document_version = RENEWAL
      elseif not value_ok(letter, value) then
        return bad_block()
      end
      about_meta = about_meta or letter == ESTIMATOR or letter == VISIBLE
      at = at + fixed + 1
    end
  end
  if total - lost > MAX_FRAMES or bytes > MAX_BATCH_BYTES then
    return nil, ff.err('invalid_input', 'frames')
  end
  return total, patches_base, document_version, mixed, large, total == 0 and 'both' or unproven, entries, bytes,
    about_meta
end

-- At a model's pace most batches are one small entry without fields. Returns the frames of such a batch, whose checks
-- are these; nil where it is another one.
local function lone_entry(args, first, last)
  if last ~= first + 2 or #args[last] > SMALL_LOG then
    return nil
  end
  local letter, count = args[first], args[first + 1]
  if letter == LIVE then
    return COUNTS[count]
  end
  return letter == LOG and count == '1' and 1 or nil
end

-- Refuses the call where a stream would refuse an entry: where the key is no stream, or has had the id `ms-sequence` or
-- a later one, which is somebody else's.
local function check_stream(stream_key, ms, sequence)
  local info = redis.pcall('XINFO', 'STREAM', stream_key)
  if info.err then
    if string.find(info.err, 'no such key', 1, true) then
      return
    end
    error(info)
  end
  for i = 1, #info, 2 do
    if info[i] == 'last-generated-id' then
      -- A part of an id has up to 20 digits, more than a number holds: ids are compared as texts of one length.
      local last_ms, last_sequence = string.match(info[i + 1], '^(%d+)-(%d+)$')
      local last = string.rep('0', 20 - #last_ms) .. last_ms .. string.rep('0', 20 - #last_sequence) .. last_sequence
      if last >= string.rep('0', 20 - #ms) .. ms .. string.format('%020d', sequence) then
        ff.corrupt(string.find(stream_key, ':live$') and 'live' or 'stream')
      end
    end
  end
end

-- Stores the payloads of a log block from `from` to before `after`, each with the block's fields, under the sequences
-- after `sequence`. Returns the id of the last one. The caller passes redis.call and string.format, as each look-up
-- of a global costs as much as a function call.
local function write_log_frames(call, format, log_key, args, from, after, first_field, last_field, ms, sequence)
  -- Only the first id is spelled with its sequence. The server counts on from it, which saves a text for each frame.
  local next_id = format('%s-%d', ms, sequence + 1)
  local last_id = next_id
  if after - from > 1 then
    -- In this order, or a sum beyond 2^53 would be rounded.
    last_id = format('%s-%d', ms, sequence + (after - from))
  end
  if last_field then
    for i = from, after - 1 do
      call('XADD', log_key, next_id, 'payload', args[i], unpack(args, first_field, last_field))
      next_id = ms .. '-*'
    end
  elseif from < after then
    call('XADD', log_key, next_id, 'payload', args[from])
    next_id = ms .. '-*'
    for i = from + 1, after - 1 do
      call('XADD', log_key, next_id, 'payload', args[i])
    end
  end
  return last_id
end

-- Stores a run without its first `skip` frames. Returns the shorter run.
local function write_run_suffix(live_key, id, run, count, skip, args, first_field, last_field)
  local suffix = run_suffix(run, count, skip)
  local entry = { 'run', suffix }
  -- `prev` belongs to the first frame of the run, which is stored.
  for i = first_field, last_field, 2 do
    if args[i] ~= 'prev' then
      entry[#entry + 1], entry[#entry + 2] = args[i], args[i + 1]
    end
  end
  redis.call('XADD', live_key, id, unpack(entry))
  return suffix
end

-- Keeps the last `kept` of a block's `count` patches in the summary; `at` is the place of the block's pending field.
local function write_patches(summary_key, args, at, count, kept, value, id, now)
  local pending_field, version = args[at], ff.text(args[at + 1] + count)
  if kept < count then
    pending_field = string.gsub(pending_field, '^(run:%d+:)%d+', '%1' .. ff.text(kept))
  end
  redis.call('HSET', summary_key, pending_field, value, 'version', version, 'last_updated_ms', now, 'cursor', id)
end

-- Replaces the summary by a document; `at` is the place of its version.
local function write_document(summary_key, args, at)
  local call = redis.call
  local version, document, patch_kind = args[at], args[at + 1], args[at + 2]
  local stored = call('HMGET', summary_key, 'version', 'last_updated_ms', 'first_applied_ms', 'cursor')
  call('DEL', summary_key)
  call('HSET', summary_key, 'document', document, 'document_version', version, 'version', stored[1],
    'last_updated_ms', stored[2], 'first_applied_ms', stored[3], 'cursor', stored[4], 'patch_kind', patch_kind)
end

-- Replaces the summary by a document that does not follow what is stored; `at` is the place of its version, and `id` is
-- the id of the newest frame.
local function write_renewal(summary_key, args, at, id, now, first_applied)
  redis.call('DEL', summary_key)
  redis.call('HSET', summary_key, 'document', args[at + 1], 'document_version', args[at], 'version', args[at],
    'last_updated_ms', now, 'first_applied_ms', first_applied or now, 'cursor', id, 'patch_kind', args[at + 2])
end

-- Applies the one value of any other block.
local function write_value(letter, value, meta_key, log_key, live_key)
  local call = redis.call
  if letter == BLOCK.TRIM_LIVE then
    call('XTRIM', live_key, 'MINID', '~', value)
  elseif letter == BLOCK.LIVE_TTL then
    call('PEXPIRE', live_key, value)
  elseif letter == BLOCK.TRIM_LOG then
    call('XTRIM', log_key, 'MAXLEN', '~', value)
  elseif letter == BLOCK.ESTIMATOR then
    call('HSET', meta_key, 'estimator', value)
  elseif value == '' then
    call('HDEL', meta_key, 'visible_sequence')
  else
    call('HSET', meta_key, 'visible_sequence', value)
  end
end

-- Stores the blocks from `at` to `last` of a checked batch, less their first `skip` frames, whose sequences begin after
-- `sequence`; `id` is the id of the last stored frame. The frames of the first block have the time `ms`, those of the
-- others `later_ms`. Returns the id of the last frame.
local function write_blocks(
  call, format, args, at, last, meta_key, log_key, live_key, summary_key, now, ms, later_ms, id, sequence, skip,
  first_applied
)
  while at <= last do
    local letter = args[at]
    local frames_in = FRAMES_IN[letter]
    if letter == LOST then
      local count = args[at + 1] + 0
      local visible = call('HGET', meta_key, 'visible_sequence') or format('%d', sequence + skip)
      sequence = sequence + count
      id = format('%s-%d', ms, sequence)
      call('XADD', log_key, id, 'lost', format('%d', count - skip), 'prev', visible)
      local told = call('HMGET', meta_key, 'lost_frames', 'lost_entries')
      call('HSET', meta_key, 'lost_frames', format('%d', (integer(told[1]) or 0) + count - skip),
        'lost_entries', format('%d', (integer(told[2]) or 0) + 1))
      skip, ms, at = 0, later_ms, at + 2
    elseif frames_in then
      local count, from, first_field, last_field = args[at + 1], at + 2, at + 3, nil
      count = count == '1' and 1 or count + 0
      if HAS_FIELDS[letter] then
        from = first_field + 2 * args[at + 2]
        last_field = from - 1
      end
      if frames_in == 'log' then
        at = from + count
        if skip > 0 then
          local left_out = math.min(skip, count)
          from, sequence, skip = from + left_out, sequence + left_out, skip - left_out
        end
        id = write_log_frames(call, format, log_key, args, from, at, first_field, last_field, ms, sequence)
        sequence = sequence + (at - from)
      else
        local value, kept = args[from], count
        sequence = sequence + count
        id = format('%s-%d', ms, sequence)
        if skip >= count then
          kept, skip = 0, skip - count
        elseif skip > 0 then
          value = write_run_suffix(live_key, id, value, count, skip, args, first_field, last_field or from - 1)
          kept, skip = count - skip, 0
        elseif last_field then
          call('XADD', live_key, id, count > 1 and 'run' or 'payload', value, unpack(args, first_field, last_field))
        else
          call('XADD', live_key, id, count > 1 and 'run' or 'payload', value)
        end
        at = from + 1
        if letter == PATCHES then
          if kept > 0 then
            write_patches(summary_key, args, at, count, kept, value, id, now)
            if not first_applied then
              first_applied = now
              call('HSET', summary_key, 'first_applied_ms', now)
            end
          end
          at = at + 2
        end
      end
      ms = later_ms
    elseif letter == DOCUMENT then
      write_document(summary_key, args, at + 1)
      at = at + 4
    elseif letter == RENEWAL then
      write_renewal(summary_key, args, at + 1, id, now, first_applied)
      at = at + 4
    else
      write_value(letter, args[at + 1], meta_key, log_key, live_key)
      at = at + 2
    end
  end
  return id
end

-- A block of frames as a push has it: `middle` stands between what the block begins with, which says its stream and its
-- fields, and its values back to back.
local function pushed_block(args, at, middle)
  local letter, count, fields, from = block_at(args, at)
  local in_log = FRAMES_IN[letter] == 'log'
  local begins = in_log and 'L\0' or 'V\0'
  if HAS_FIELDS[letter] then
    local texts = { in_log and 'L' or 'V', put_varint((from - fields) / 2) }
    for i = fields, from - 1 do
      texts[#texts + 1] = put_varint(#args[i])
      texts[#texts + 1] = args[i]
    end
    begins = table.concat(texts)
  end
  return begins .. middle .. table.concat(args, '', from, in_log and from + count - 1 or from)
end

-- Whether frames may have been pushed under ids of this time.
local function may_be_pushed(ms, now)
  return #ms == 13 and not string.find(ms, '%D') and (ms <= now or ms - now <= MAX_PUSHED_AHEAD_MS)
end

-- Checks one part of a call, and applies it: its keys are `key_count` ones from `key` on, its arguments those from `at`
-- to `last`. The other parts of the call have left `room` for entries and `bytes_left` for their bytes. Returns the
-- answer to the part, its entries and its bytes; or the refusal alone.
--
-- The caller passes functions of the server, as each look-up of a global costs as much as a function call. All of a
-- head has known places: its first 15 bytes are what an answer says of the lease, its writer has the length of the
-- caller's or is another one, and the sequence of the last id begins behind 13 digits and a hyphen. Times in ms have 13
-- digits from 2001 to 2286, so as texts they compare as they do as numbers: a lease is held that does not come before
-- the next millisecond, whatever follows its time. No id is shorter than the last one, so a new one is written over it.
local function append_part(
  call, publish, format, sub, byte, keys, args, key, key_count, at, last, now, next_ms, room, bytes_left
)
  local head_key, writer = keys[key], args[at]
  local first = key_count == 1 and at + 2 or at + 3
  if first > last + 1 then
    return ff.err('invalid_input', 'arguments')
  elseif key_count == 1 and first <= last then
    return ff.err('invalid_input', 'keys')
  end
  local head, id_at = call('GET', head_key), 18 + #writer
  if
    not head or sub(head, 17, id_at - 2) ~= writer or byte(head, id_at - 1) ~= SPACE or writer == NO_WRITER
  then
    return append_refusal(head_key, writer)
  end
  local lease, push = sub(head, 1, 15), args[first - 1]
  if lease < next_ms then
    return append_refusal(head_key, writer)
  end
  if #push > MAX_BATCH_BYTES then
    return ff.err('invalid_input', 'push')
  end
  if key_count == 1 then
    if #push > bytes_left then
      return ff.err('invalid_input', 'parts')
    end
    call('SPUBLISH', head_key, push)
    return lease, 0, #push
  end

  local pushed_ms, replayed_ms
  if args[first] == PUSHED_MS and first < last then
    pushed_ms = args[first + 1]
    first = first + 2
    if not may_be_pushed(pushed_ms, now) or args[first] == PATCHES or FRAMES_IN[args[first]] ~= 'live' then
      return ff.err('invalid_input', 'pushed_ms')
    end
  elseif args[first] == REPLAYED_MS and first + 1 < last then
    pushed_ms, replayed_ms = args[first + 1], args[first + 2]
    first = first + 3
    if
      not may_be_pushed(pushed_ms, now) or not may_be_pushed(replayed_ms, now) or replayed_ms < pushed_ms
      or not FRAMES_IN[args[first]]
    then
      return ff.err('invalid_input', 'replayed_ms')
    end
  end
  -- A push says one time for its frames, and has none of a loss.
  if (replayed_ms or args[first] == LOST) and push ~= ' ' then
    return ff.err('invalid_input', 'push')
  end
  local lone = lone_entry(args, first, last)
  local total, patches_base, document_version, mixed, large, unproven, entries, bytes, about_meta
  if lone then
    total, entries, bytes = lone, 1, #args[last]
  else
    total, patches_base, document_version, mixed, large, unproven, entries, bytes, about_meta =
      check_blocks(args, first, last)
    if not total then
      return patches_base
    end
  end
  if entries > room or bytes > bytes_left then
    return ff.err('invalid_input', 'parts')
  end
  local needs_summary = patches_base or document_version
  if (needs_summary and key_count < 4) or (mixed and key_count < 3) then
    return ff.err('invalid_input', 'keys')
  end

  -- After the last stored frame the batch appends; from an older one of this writer it is a duplicate; else a gap.
  local previous_sequence, skip, skipped = args[at + 1], 0, 0
  local sequence
  if sub(head, id_at + 14) == previous_sequence then
    sequence = previous_sequence + 0
  else
    local last_id = sub(head, id_at)
    local _, stored = ff.split_id(last_id)
    if not stored then
      ff.corrupt('head')
    end
    sequence = integer(previous_sequence)
    if not sequence then
      return ff.err('invalid_input', 'previous_sequence')
    end
    skip = stored - sequence
    if skip < 0 or sequence + 1 < tonumber(call('HGET', ff.meta_beside(head_key), 'writer_base')) then
      return ff.err('sequence_gap', ff.text(stored + 1), ff.text(sequence + 1))
    end
    if skip == total then
      -- The repeat of the last batch, as after a lost reply.
      return last_id .. ' ' .. lease, 0, 0
    elseif skip > total then
      local slot_tag, _, attempt = split_head_key(head_key)
      local log_key, window_key = ff.key('stream', slot_tag, attempt), ff.key('live', slot_tag, attempt)
      return stored_id(log_key, window_key, sequence + total) .. ' ' .. lease, 0, 0
    end
    skipped = skipped_patches(args, first, skip)
    if not skipped then
      return ff.err('invalid_input', 'block')
    end
  end
  if sequence + total > MAX_INTEGER then
    return ff.err('invalid_input', 'previous_sequence')
  end
  local first_applied
  if needs_summary then
    local summary = call('HMGET', keys[key + 3], 'version', 'first_applied_ms')
    local version = tonumber(summary[1] or 0)
    -- Patches that an overlap leaves out are in the stored version already.
    local expected = patches_base and patches_base + skipped or document_version
    if version ~= expected and expected ~= RENEWAL then
      return ff.err('summary_conflict', ff.text(version), ff.text(expected))
    end
    first_applied = summary[2]
  end
  -- The times of the first block, and of those behind it.
  local ms = sub(head, id_at, id_at + 12)
  local later_ms = ms
  if pushed_ms then
    ms = pushed_ms > ms and pushed_ms or ms
    later_ms = replayed_ms or now
    later_ms = later_ms > ms and later_ms or ms
  elseif now > ms then
    ms, later_ms = now, now
  end
  local stream_key = keys[key + 1]

  local id
  if lone and skip == 0 then
    id = format('%s-%d', ms, sequence + total)
    call('XADD', key_count > 2 and args[first] == LIVE and keys[key + 2] or stream_key, id,
      total > 1 and 'run' or 'payload', args[last])
  else
    local live_key = key_count > 2 and keys[key + 2] or nil
    if unproven then
      if unproven ~= 'live' then
        check_stream(stream_key, live_key and later_ms or ms, sequence + skip + 1)
      end
      if live_key and unproven ~= 'log' then
        check_stream(live_key, ms, sequence + skip + 1)
      end
    end
    local meta_key
    if large or about_meta then
      meta_key = ff.meta_beside(head_key)
      ff.expect('meta', meta_key)
    end
    id = write_blocks(
      call, format, args, first, last, meta_key, stream_key, live_key or stream_key, keys[key + 3], now, ms, later_ms,
      sub(head, id_at), sequence, skip, first_applied
    )
    if large then
      call('HSET', meta_key, 'large_id', id)
    end
    if total == 0 then
      return id .. ' ' .. lease, entries, bytes
    end
  end
  call('SETRANGE', head_key, id_at - 1, id)
  if push ~= '' then
    local values = ''
    if skip > 0 or (pushed_ms and sub(id, 1, 13) ~= ms) then
      -- A push says one time for all its frames. Frames of others, as of those that a repeat leaves out, are read.
      push = ' '
    elseif byte(push) == PLUS then
      if lone then
        push, values = (args[first] == LIVE and ' V\0' or ' L\0') .. sub(push, 2), args[last]
      else
        push, values = ' ', pushed_block(args, first, sub(push, 2))
      end
    end
    -- What is stored stays stored where its user may not publish.
    publish('SPUBLISH', head_key, STORED .. id .. push .. values)
  end
  return id .. ' ' .. lease, entries, bytes
end

-- The error that a part met, as the server would answer it for a whole call: its text, and the place.
local function fault(met)
  local text = type(met) == 'table' and met.err or 'ERR ' .. tostring(met)
  -- Lua names the place of a caller as a text alone. Levels 1 and 2 are pcall and this function; the next one is the
  -- function that raised the error, which has no place where the server brings it.
  for level = 3, 4 do
    local _, place = pcall(error, '', level)
    local line = string.match(place, ':(%d+): $')
    if line then
      return { err = text .. ' script: on @user_function:' .. line .. '.' }
    end
  end
  return { err = text }
end

-- The sizes of parts by their texts, as COUNTS.
local KEY_COUNTS, ARG_COUNTS = {}, {}
for arg_count = 2, 24 do
  for key_count = 1, 4 do
    KEY_COUNTS[arg_count .. '' .. key_count], ARG_COUNTS[arg_count .. '' .. key_count] = key_count, arg_count
  end
end

-- The numbers of keys and of arguments of a part; nil where its size says none.
local function part_size(size)
  local number = integer(size)
  local key_count = number and number % 10
  if not key_count or key_count < 1 or key_count > 4 then
    return nil
  end
  return key_count, (number - key_count) / 10
end

-- Looks through the sizes of the parts of a call. Returns the number of parts; nil where the sizes do not agree with
-- the numbers of keys and arguments, or the parts are too many.
local function count_parts(keys, args)
  local parts, key_total, at, last = 0, 0, 1, #args
  while at <= last do
    local size = args[at]
    local key_count, arg_count = KEY_COUNTS[size], ARG_COUNTS[size]
    if not key_count then
      key_count, arg_count = part_size(size)
      if not key_count then
        return nil
      end
    end
    parts, key_total, at = parts + 1, key_total + key_count, at + 1 + arg_count
  end
  return at == last + 1 and key_total == #keys and parts >= 1 and parts <= MAX_PARTS and parts or nil
end

-- ff_append
--   keys:    head stream live summary
--   args:    size writer previous_sequence push block...
--   returns: now_ms answer...
--   errors:  execution_not_found stale_owner state_lost suspended stream_closed lease_expired writer_superseded
--            sequence_gap summary_conflict payload_too_large invalid_input
--
-- A call has 1 to 128 parts, each about one attempt; the keys of all parts follow one another, and so do their
-- arguments. A part is checked, stored and answered on its own, one after the other: what one is refused changes
-- nothing for another. `size` is a number whose last digit is the number of keys of the part; the digits before are the
-- number of arguments behind the size. Where the sizes do not add up, the whole call is refused.
--
-- Each key costs the server time, so a batch names the ones that it needs: two, three or four. With two, all its
-- blocks go to one stream, which is `stream`, log or live window; with more, `stream` is the log. A refusal reads the
-- core, and the repeat of a stored batch reads both streams: those keys are spelled from the head key, and share its
-- slot.
--
-- `push` is '', or what is published on the channel of the attempt, behind `F` and the id of the last frame, once the
-- frames are stored: a space and a body; or `+`, and what stands in a body between the fields of its one block, which
-- is the first of the part, and the values of that block: these cross the wire once. A part with the head key alone
-- stores nothing: its arguments are `writer push`, its fence is that of a batch, and `push` is published as it is.
-- ff_fast/keys.py has the table of the channels.
--
-- The answer to a part is one string: the id of the last frame where it stores, when the lease ends in ms, and 1 where
-- a cancel was requested, else 0. A refused part is answered by the refusal, and one that met an error of the server by
-- that error. A call of one part has no list: it returns one string, `now_ms` and the answer, or the refusal, or fails
-- with the error. To make a reply of a Lua table costs the server as much as two commands.
redis.register_function('ff_append', function(keys, args)
  local call, publish, format, sub, byte = redis.call, redis.pcall, string.format, string.sub, string.byte
  local key_total, last = #keys, #args
  local time = call('TIME')
  local ms = time[1] * 1000 + time[2] / 1000
  local now, next_ms = format('%d', ms), format('%d', ms + 1)
  local key_count, arg_count = KEY_COUNTS[args[1]], ARG_COUNTS[args[1]]
  if not key_count then
    key_count, arg_count = part_size(args[1])
  end
  if key_count == key_total and arg_count == last - 1 then
    local answer, entries = append_part(
      call, publish, format, sub, byte, keys, args, 1, key_total, 2, last, now, next_ms, MAX_FRAMES, MAX_BATCH_BYTES
    )
    return entries and now .. ' ' .. answer or answer
  end
  local parts = count_parts(keys, args)
  if not parts then
    return ff.err('invalid_input', 'parts')
  end
  local answers, part, key, at, room, bytes_left = { now }, 0, 1, 1, MAX_FRAMES, MAX_BATCH_BYTES
  -- Applies the parts from the next one on. Where one meets an error, the place is behind it.
  local function apply()
    while part < parts do
      local size, own_key, from = args[at], key, at + 1
      local keys_of, args_of = KEY_COUNTS[size], ARG_COUNTS[size]
      if not keys_of then
        keys_of, args_of = part_size(size)
      end
      part, key, at = part + 1, key + keys_of, from + args_of
      local answer, entries, bytes = append_part(
        call, publish, format, sub, byte, keys, args, own_key, keys_of, from, at - 1, now, next_ms, room, bytes_left
      )
      answers[part + 1] = answer
      if entries then
        room, bytes_left = room - entries, bytes_left - bytes
      end
    end
  end
  repeat
    local done, met = xpcall(apply, fault)
    if not done then
      answers[part + 1] = met
    end
  until done
  return answers
end)

-- What a writer continues from, of the meta hash and the summary of an attempt.
function ff.written_before(head_key, summary_key)
  local call = redis.call
  local before = call(
    'HMGET', ff.meta_beside(head_key), 'visible_sequence', 'estimator', 'writer_openings', 'payload_limit'
  )
  before[5] = call('HGET', summary_key, 'version') or '0'
  return before
end

-- Makes `writer` the writer of an attempt. Returns what it continues from: the last id, the last visible sequence, the
-- state of the estimator, the version of the summary, and the number of writers so far. `before` was read before the
-- first write of the call. So was published that something changes: a user who may not publish learns it there, and not
-- from readers that are late.
function ff.open_writer(head, head_key, before, writer, payload_limit)
  local call, meta_key = redis.call, ff.meta_beside(head_key)
  local visible_sequence, estimator, openings, limit_before, version = unpack(before, 1, 5)
  local _, sequence = ff.split_id(head.last_id)
  if head.writer ~= writer then
    openings = ff.text((tonumber(openings or '0') or 0) + 1)
    head.writer = writer
    ff.write_head(head_key, head)
    call('HSET', meta_key, 'writer_base', ff.text(sequence + 1), 'writer_openings', openings)
    if (integer(payload_limit) or 0) > (integer(limit_before) or ff.USUAL_PAYLOAD) then
      call('HSET', meta_key, 'payload_limit', payload_limit)
    end
  end
  return head.last_id, visible_sequence or ff.text(sequence), estimator or '', version, openings
end

-- ff_open_writer
--   keys:    core head summary
--   args:    writer lease_id payload_limit
--   returns: last_id visible_sequence estimator summary_version opening
--   errors:  execution_not_found stale_owner state_lost suspended stream_closed lease_expired invalid_input
--
-- Opening again with the same writer id changes nothing, so the call may be repeated after a lost reply. An earlier
-- writer of the attempt is superseded. lease_id proves the lease that the writer id names by its digest. No payload of
-- the writer is larger than `payload_limit`, from which readers take how many entries they ask for at once. `opening`
-- counts the writers of the attempt, from 1.
redis.register_function('ff_open_writer', function(keys, args)
  local call = redis.call
  local core_key, head_key, summary_key = unpack(keys, 1, 3)
  local writer, lease_id, payload_limit = unpack(args, 1, 3)
  local refused = refusal(core_key, head_key, writer or '')
  if refused[2] ~= 'execution_not_found' and refused[2] ~= 'invalid_input'
    and string.match(writer, '^%d+:(%x+)') ~= ff.lease_digest(lease_id or '')
  then
    return ff.err('stale_owner')
  end
  -- Any other writer, or none, is superseded by opening this one.
  if refused[2] ~= 'writer_superseded' then
    return refused
  end
  local head = ff.read_head(head_key)
  local before = ff.written_before(head_key, summary_key)
  if head.writer ~= writer then
    -- Frames that the writer before has pushed and not stored are lost: readers look.
    call('SPUBLISH', head_key, PUSH.CHANGED)
  end
  return ff.ok(ff.open_writer(head, head_key, before, writer, payload_limit))
end)
