-- More than any command needs.
local WORDS = 12

-- ff_version
--   keys:    partitions probe
--   args:    right...
--   returns: contract digest partitions eviction_policy engine settings rights
--   errors:
--
-- `partitions` is the partition count of the deployment, '' where none is stored yet. Nothing is stored in `probe`: its
-- slot is another one, so that a node of a cluster refuses the call. `eviction_policy` is that of the server, '' where
-- its memory has no limit. `engine` is name and version of the server, and `settings` is '1' where the caller may ask
-- for the settings of persistence, which a function may not. A server of ff_fast.embedded, which is thrown away, tells
-- neither. All are '' where the caller may not read INFO: a refused command would fill the log of ACL violations.
-- `rights` has a letter for each `right`, a command and arguments with blanks between, of which the last one is
-- repeated: 1 where the caller may run it, 0 where not, and ? where the server does not know it. None of them is run.
redis.register_function({
  function_name = 'ff_version',
  callback = function(keys, args)
    local partitions_key = keys[1]
    local eviction_policy, engine, settings = '', '', ''
    if redis.acl_check_cmd('INFO', 'memory') then
      local info = redis.call('INFO', 'memory', 'server')
      if string.find(info, '\nmaxmemory:[1-9]') then
        eviction_policy = string.match(info, '\nmaxmemory_policy:(%S+)') or ''
      end
      if not string.find(info, '\nconfig_file:[^\r\n]*/ff_fast%-[%w_]+/valkey%.conf') then
        local valkey = string.match(info, '\nvalkey_version:(%S+)')
        engine = valkey and 'Valkey ' .. valkey or 'Redis ' .. (string.match(info, '\nredis_version:(%S+)') or '')
        -- A command that the server does not have raises an error.
        local known, may = pcall(redis.acl_check_cmd, 'CONFIG', 'GET', 'appendonly', 'save')
        settings = known and may and '1' or ''
      end
    end
    local partitions = redis.call('GET', partitions_key) or ''
    local rights = {}
    for i, right in ipairs(args) do
      local words = {}
      for word in string.gmatch(right, '%S+') do
        words[#words + 1] = word
      end
      -- Servers crash where a command has too few arguments: only this question comes without a check of their number.
      while #words < WORDS do
        words[#words + 1] = words[#words] or ''
      end
      local known, may = pcall(redis.acl_check_cmd, unpack(words, 1, WORDS))
      rights[i] = known and (may and '1' or '0') or '?'
    end
    return ff.ok('@CONTRACT@', '@DIGEST@', partitions, eviction_policy, engine, settings, table.concat(rights))
  end,
  flags = { 'no-writes' },
})
