-- ff_version
--   keys:
--   args:
--   returns: contract digest
--   errors:
redis.register_function({
  function_name = 'ff_version',
  callback = function()
    return ff.ok('@CONTRACT@', '@DIGEST@')
  end,
  flags = { 'no-writes' },
})
