-- ff_version
--   keys:    partitions
--   args:
--   returns: contract digest partitions
--   errors:
redis.register_function({
  function_name = 'ff_version',
  callback = function(keys)
    return ff.ok('@CONTRACT@', '@DIGEST@', redis.call('GET', keys[1]) or '')
  end,
  flags = { 'no-writes' },
})
