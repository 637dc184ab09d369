-- ff_version
--   keys:    partitions probe
--   args:
--   returns: contract digest partitions
--   errors:
--
-- `partitions` is the partition count of the deployment, '' where none is stored yet. Nothing is stored in `probe`: its
-- slot is another one, so that a node of a cluster refuses the call.
redis.register_function({
  function_name = 'ff_version',
  callback = function(keys)
    local partitions_key = keys[1]
    return ff.ok('@CONTRACT@', '@DIGEST@', redis.call('GET', partitions_key) or '')
  end,
  flags = { 'no-writes' },
})
