-- Usage: the execution's own ledger, fenced and in its slot; budgets, each in a slot of its own.
-- Counts stay at or below 2^53-1, and a report is applied completely or not at all.

-- Dimensions and amounts of args from `at` on, or nil where one is not a count or stands twice.
local function amounts_of(args, at)
  local amounts, order = {}, {}
  for i = at, #args, 2 do
    local amount = ff.integer(args[i + 1])
    if not amount or amounts[args[i]] then
      return nil
    end
    amounts[args[i]] = amount
    order[#order + 1] = args[i]
  end
  return amounts, order
end

-- ff_report_usage
--   keys:    core
--   args:    attempt_index lease_id lease_epoch phase dedup_key (dimension amount)...
--   returns: budget_ids
--   errors:  execution_not_found stale_owner suspended execution_not_active lease_expired invalid_input
--
-- Phase `check` asks whether the report may be made, and to which budgets; `apply` adds it to the ledger. The status is
-- ALREADY_APPLIED where the report with this dedup key was.
redis.register_function('ff_report_usage', function(keys, args)
  local call = redis.call
  local amounts, order = amounts_of(args, 6)
  if not amounts or #args[5] == 0 then
    return ff.err('invalid_input', 'usage')
  end
  local x, refusal = ff.owned(keys[1], args)
  if not x then
    return refusal
  end
  if call('HEXISTS', x.prefix .. 'usage:dedup', args[5]) == 1 then
    return { 1, 'ALREADY_APPLIED', x.fields.budget_ids or '' }
  end
  local totals = {}
  for _, name in ipairs(order) do
    totals[name] = tonumber(call('HGET', x.prefix .. 'usage', name) or '0') + amounts[name]
    if totals[name] > ff.MAX_INTEGER then
      return ff.err('invalid_input', 'usage')
    end
  end
  if args[4] == 'apply' then
    for _, name in ipairs(order) do
      call('HSET', x.prefix .. 'usage', name, ff.text(totals[name]))
    end
    call('HSET', x.prefix .. 'usage:dedup', args[5], ff.text(x.now))
  end
  return ff.ok(x.fields.budget_ids or '')
end)

-- ff_create_budget
--   keys:    limits usage
--   args:    (name limit)...
--   returns:
--   errors:  invalid_input
--
-- A name is `hard:` or `soft:` and a dimension. Creating a budget again replaces its limits and keeps what was used.
redis.register_function('ff_create_budget', function(keys, args)
  local amounts = amounts_of(args, 1)
  if not amounts or #args == 0 then
    return ff.err('invalid_input', 'limits')
  end
  redis.call('DEL', keys[1])
  for name, limit in pairs(amounts) do
    redis.call('HSET', keys[1], name, ff.text(limit))
  end
  return ff.ok()
end)

-- ff_charge_budget
--   keys:    limits usage dedup
--   args:    dedup_ttl_ms (dimension amount)...
--   returns: dimension current limit
--   errors:  budget_not_found invalid_input
--
-- HARD_BREACH: nothing was added. SOFT_BREACH: added, and above a soft limit. ALREADY_APPLIED: the dedup key was there.
redis.register_function('ff_charge_budget', function(keys, args)
  local call = redis.call
  local ttl_ms = ff.integer(args[1])
  local amounts, order = amounts_of(args, 2)
  if not ttl_ms or ttl_ms < 1 or not amounts then
    return ff.err('invalid_input', 'usage')
  end
  if call('EXISTS', keys[1]) == 0 then
    return ff.err('budget_not_found')
  end
  if call('EXISTS', keys[3]) == 1 then
    return { 1, 'ALREADY_APPLIED', '', '0', '0' }
  end
  local totals, soft = {}, nil
  for _, name in ipairs(order) do
    local used = tonumber(call('HGET', keys[2], name) or '0')
    local hard = tonumber(call('HGET', keys[1], 'hard:' .. name))
    totals[name] = used + amounts[name]
    if totals[name] > ff.MAX_INTEGER then
      return ff.err('invalid_input', 'usage')
    end
    if hard and totals[name] > hard then
      return { 1, 'HARD_BREACH', name, ff.text(used), ff.text(hard) }
    end
    local limit = tonumber(call('HGET', keys[1], 'soft:' .. name))
    if limit and totals[name] > limit and not soft then
      soft = { 1, 'SOFT_BREACH', name, ff.text(totals[name]), ff.text(limit) }
    end
  end
  for _, name in ipairs(order) do
    call('HSET', keys[2], name, ff.text(totals[name]))
  end
  -- What was charged, so that taking it back takes back this.
  call('HSET', keys[3], '', '0')
  for _, name in ipairs(order) do
    call('HSET', keys[3], name, ff.text(amounts[name]))
  end
  call('PEXPIRE', keys[3], args[1])
  return soft or ff.ok('', '0', '0')
end)

-- ff_release_charge
--   keys:    limits usage dedup
--   args:
--   returns:
--   errors:
--
-- Takes back a charge whose report was refused elsewhere; nothing where the charge is not there.
redis.register_function('ff_release_charge', function(keys)
  local call = redis.call
  local charged = call('HGETALL', keys[3])
  for i = 1, #charged, 2 do
    if charged[i] ~= '' then
      local used = tonumber(call('HGET', keys[2], charged[i]) or '0')
      call('HSET', keys[2], charged[i], ff.text(math.max(used - tonumber(charged[i + 1]), 0)))
    end
  end
  call('DEL', keys[3])
  return ff.ok()
end)
