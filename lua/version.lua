-- ff_version
--   keys:    partitions
--   args:
--   returns: contract digest partitions
--   errors:
--
-- `partitions` is the partition count of the deployment, '' where none is stored yet. A node of a cluster that does not
-- own the key's slot can be asked without the key, and answers ''.
redis.register_function({
  function_name = 'ff_version',
  callback = function(keys)
    local partitions_key = keys[1]
    return ff.ok('@CONTRACT@', '@DIGEST@', partitions_key and redis.call('GET', partitions_key) or '')
  end,
  flags = { 'no-writes' },
})
