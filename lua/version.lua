-- ff_version
--   keys:    partitions probe
--   args:
--   returns: contract digest partitions eviction_policy
--   errors:
--
-- `partitions` is the partition count of the deployment, '' where none is stored yet. Nothing is stored in `probe`: its
-- slot is another one, so that a node of a cluster refuses the call. `eviction_policy` is that of the server, '' where
-- its memory has no limit, and where the caller may not read INFO; a refused INFO would fill the log of ACL violations.
redis.register_function({
  function_name = 'ff_version',
  callback = function(keys)
    local partitions_key = keys[1]
    local eviction_policy = ''
    if redis.acl_check_cmd('INFO', 'memory') then
      local info = redis.call('INFO', 'memory')
      if string.find(info, '\nmaxmemory:[1-9]') then
        eviction_policy = string.match(info, '\nmaxmemory_policy:(%S+)') or ''
      end
    end
    return ff.ok('@CONTRACT@', '@DIGEST@', redis.call('GET', partitions_key) or '', eviction_policy)
  end,
  flags = { 'no-writes' },
})
