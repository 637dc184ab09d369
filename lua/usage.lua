-- Usage: the ledger of an execution, fenced and in its slot; budgets, each in a slot of its own. Counts stay at or
-- below 2^53-1. A report is applied completely or not at all.

-- The amounts of args from `first` on by dimension, and the dimensions in their order; or nil where an amount is no
-- count or a dimension stands twice.
local function amounts_of(args, first)
  local amounts, order = {}, {}
  for i = first, #args, 2 do
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
-- ALREADY_APPLIED where a report with this dedup key was added before.
redis.register_function('ff_report_usage', function(keys, args)
  local call = redis.call
  local core_key = keys[1]
  local attempt_index, lease_id, lease_epoch, phase, dedup_key = unpack(args, 1, 5)
  local amounts, order = amounts_of(args, 6)
  if not amounts or #dedup_key == 0 then
    return ff.err('invalid_input', 'usage')
  end
  local execution, refusal = ff.load_owned(core_key, attempt_index, lease_id, lease_epoch)
  if not execution then
    return refusal
  end
  local usage_key, applied_key = ff.execution_key(execution, 'usage'), ff.execution_key(execution, 'usage_dedup')
  local budget_ids = execution.fields.budget_ids or ''
  if call('HEXISTS', applied_key, dedup_key) == 1 then
    return ff.reply('ALREADY_APPLIED', budget_ids)
  end
  local totals = {}
  for _, name in ipairs(order) do
    totals[name] = tonumber(call('HGET', usage_key, name) or '0') + amounts[name]
    if totals[name] > ff.MAX_INTEGER then
      return ff.err('invalid_input', 'usage')
    end
  end
  if phase == 'apply' then
    for _, name in ipairs(order) do
      call('HSET', usage_key, name, ff.text(totals[name]))
    end
    call('HSET', applied_key, dedup_key, ff.text(execution.now))
  end
  return ff.ok(budget_ids)
end)

-- ff_create_budget
--   keys:    limits usage
--   args:    (name limit)...
--   returns:
--   errors:  invalid_input
--
-- A name is `hard:` or `soft:` and a dimension. Creating a budget again replaces its limits and keeps its usage.
redis.register_function('ff_create_budget', function(keys, args)
  local limits_key = keys[1]
  local limits = amounts_of(args, 1)
  if not limits or #args == 0 then
    return ff.err('invalid_input', 'limits')
  end
  redis.call('DEL', limits_key)
  for name, limit in pairs(limits) do
    redis.call('HSET', limits_key, name, ff.text(limit))
  end
  return ff.ok()
end)

-- ff_charge_budget
--   keys:    limits usage charge
--   args:    dedup_ttl_ms (dimension amount)...
--   returns: dimension current limit
--   errors:  budget_not_found invalid_input
--
-- The status is HARD_BREACH where nothing was added, SOFT_BREACH where the report was added and a soft limit passed,
-- ALREADY_APPLIED where the charge was there.
redis.register_function('ff_charge_budget', function(keys, args)
  local call = redis.call
  local limits_key, usage_key, charge_key = unpack(keys, 1, 3)
  local dedup_ttl_ms = args[1]
  local amounts, order = amounts_of(args, 2)
  if (ff.integer(dedup_ttl_ms) or 0) < 1 or not amounts then
    return ff.err('invalid_input', 'usage')
  end
  if call('EXISTS', limits_key) == 0 then
    return ff.err('budget_not_found')
  end
  if call('EXISTS', charge_key) == 1 then
    return ff.reply('ALREADY_APPLIED', '', '0', '0')
  end
  local totals, soft_breach = {}, nil
  for _, name in ipairs(order) do
    local used = tonumber(call('HGET', usage_key, name) or '0')
    local hard = tonumber(call('HGET', limits_key, 'hard:' .. name))
    totals[name] = used + amounts[name]
    if totals[name] > ff.MAX_INTEGER then
      return ff.err('invalid_input', 'usage')
    end
    if hard and totals[name] > hard then
      return ff.reply('HARD_BREACH', name, ff.text(used), ff.text(hard))
    end
    local soft = tonumber(call('HGET', limits_key, 'soft:' .. name))
    if soft and totals[name] > soft and not soft_breach then
      soft_breach = ff.reply('SOFT_BREACH', name, ff.text(totals[name]), ff.text(soft))
    end
  end
  for _, name in ipairs(order) do
    call('HSET', usage_key, name, ff.text(totals[name]))
  end
  -- The charge keeps its amounts, so that it can be taken back. The field '' makes a charge of nothing exist too.
  call('HSET', charge_key, '', '0')
  for _, name in ipairs(order) do
    call('HSET', charge_key, name, ff.text(amounts[name]))
  end
  call('PEXPIRE', charge_key, dedup_ttl_ms)
  return soft_breach or ff.ok('', '0', '0')
end)

-- ff_release_charge
--   keys:    limits usage charge
--   args:
--   returns:
--   errors:
--
-- Takes back a charge whose report was refused by another budget; without such a charge it does nothing.
redis.register_function('ff_release_charge', function(keys)
  local call = redis.call
  local _, usage_key, charge_key = unpack(keys, 1, 3)
  for name, amount in pairs(ff.hash(charge_key) or {}) do
    if name ~= '' then
      local used = tonumber(call('HGET', usage_key, name) or '0')
      call('HSET', usage_key, name, ff.text(math.max(used - tonumber(amount), 0)))
    end
  end
  call('DEL', charge_key)
  return ff.ok()
end)
