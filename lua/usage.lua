-- Usage: the ledger of an execution, fenced and in its slot; budgets, each in a slot of its own. Counts stay at or
-- below 2^53-1. A report is applied completely or not at all.

-- Most dimensions of a ledger, a budget or a report.
local MAX_DIMENSIONS = 256
-- How many reports are remembered, so that a repeat of one is not added again. A report without a key of the caller's
-- has an id for its own retries alone, which come within seconds.
local KEYED_REPORTS, OTHER_REPORTS, CHARGES = 1000, 100, 200

-- The amounts of args from `first` on by dimension, and the dimensions in their order; or nil where an amount is no
-- count, a dimension stands twice, or there are too many.
local function amounts_of(args, first)
  local amounts, order = {}, {}
  for i = first, #args, 2 do
    local amount = ff.integer(args[i + 1])
    if not amount or amounts[args[i]] or #order == MAX_DIMENSIONS then
      return nil
    end
    amounts[args[i]] = amount
    order[#order + 1] = args[i]
  end
  return amounts, order
end

-- The totals of a ledger after a report; or nil where one is no number or too large, or where there are too many.
local function totals_of(usage_key, amounts, order)
  local used, totals, new = ff.hash_fields(usage_key, order), {}, 0
  for _, name in ipairs(order) do
    local before = ff.integer(used[name] or '0')
    if not before then
      ff.corrupt('usage')
    end
    new = new + (used[name] and 0 or 1)
    totals[name] = before + amounts[name]
    if totals[name] > ff.MAX_INTEGER then
      return nil
    end
  end
  if new > 0 and redis.call('HLEN', usage_key) + new > MAX_DIMENSIONS then
    return nil
  end
  return totals, used
end

local function write_totals(usage_key, totals, order)
  local flat = {}
  for _, name in ipairs(order) do
    flat[#flat + 1], flat[#flat + 2] = name, ff.text(totals[name])
  end
  ff.write_list('HSET', usage_key, flat)
end

-- A window of the last reports, as one hash: `id:<id>` holds what is remembered of a report, `at:<place>` the id in
-- that place, `next` the place of the next one. The newest takes the place of the oldest, so the hash has an end. A
-- report that was taken back keeps its place with an empty value, which it fills again when it is repeated.
local function recall(window_key, id)
  local value = redis.call('HGET', window_key, 'id:' .. id)
  return value ~= '' and value
end

local function remember(window_key, id, value, size)
  local call = redis.call
  if call('HEXISTS', window_key, 'id:' .. id) == 1 then
    call('HSET', window_key, 'id:' .. id, value)
    return
  end
  local place = ff.integer(call('HGET', window_key, 'next')) or 0
  local oldest = call('HGET', window_key, 'at:' .. place)
  if oldest then
    call('HDEL', window_key, 'id:' .. oldest)
  end
  call('HSET', window_key, 'id:' .. id, value, 'at:' .. place, id, 'next', ff.text((place + 1) % size))
end

-- ff_report_usage
--   keys:    core
--   args:    attempt_index lease_id lease_epoch phase kind report_id (dimension amount)...
--   returns: budget_ids
--   errors:  execution_not_found stale_owner state_lost suspended execution_not_active lease_expired invalid_input
--
-- Phase `check` asks whether the report may be made, and to which budgets; `apply` adds it to the ledger. The status is
-- ALREADY_APPLIED where a report with this id was added before, as far as the ledger remembers: it knows the last
-- KEYED_REPORTS reports of kind `keyed`, whose id is the caller's key, and the last OTHER_REPORTS of kind `once`.
redis.register_function('ff_report_usage', function(keys, args)
  local core_key = keys[1]
  local attempt_index, lease_id, lease_epoch, phase, kind, report_id = unpack(args, 1, 6)
  local amounts, order = amounts_of(args, 7)
  if not amounts or #report_id == 0 then
    return ff.err('invalid_input', 'usage')
  end
  local execution, refusal = ff.load_owned(core_key, attempt_index, lease_id, lease_epoch)
  if not execution then
    return refusal
  end
  local keyed = kind == 'keyed'
  local usage_key = ff.execution_key(execution, 'usage')
  local window_key = ff.execution_key(execution, keyed and 'usage_dedup' or 'usage_recent')
  local budget_ids = execution.fields.budget_ids or ''
  if recall(window_key, report_id) then
    return ff.reply('ALREADY_APPLIED', budget_ids)
  end
  local totals = totals_of(usage_key, amounts, order)
  if not totals then
    return ff.err('invalid_input', 'usage')
  end
  if phase == 'apply' then
    write_totals(usage_key, totals, order)
    remember(window_key, report_id, '1', keyed and KEYED_REPORTS or OTHER_REPORTS)
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
--   keys:    limits usage charges
--   args:    charge_id window_ms (dimension amount)...
--   returns: dimension current limit
--   errors:  budget_not_found invalid_input
--
-- The status is HARD_BREACH where nothing was added, SOFT_BREACH where the report was added and a soft limit passed,
-- ALREADY_APPLIED where the charge was there. `charges` is of one execution: the budget remembers the last CHARGES
-- reports of each, and forgets them window_ms after the last.
redis.register_function('ff_charge_budget', function(keys, args)
  local call = redis.call
  local limits_key, usage_key, charges_key = unpack(keys, 1, 3)
  local charge_id, window_ms = unpack(args, 1, 2)
  local amounts, order = amounts_of(args, 3)
  if (ff.integer(window_ms) or 0) < 1 or not amounts then
    return ff.err('invalid_input', 'usage')
  end
  if call('EXISTS', limits_key) == 0 then
    return ff.err('budget_not_found')
  end
  if recall(charges_key, charge_id) then
    return ff.reply('ALREADY_APPLIED', '', '0', '0')
  end
  local names = {}
  for i, name in ipairs(order) do
    names[2 * i - 1], names[2 * i] = 'hard:' .. name, 'soft:' .. name
  end
  local limits = ff.hash_fields(limits_key, names)
  local totals, used = totals_of(usage_key, amounts, order)
  if not totals then
    return ff.err('invalid_input', 'usage')
  end
  local soft_breach
  for _, name in ipairs(order) do
    local hard, soft = ff.integer(limits['hard:' .. name]), ff.integer(limits['soft:' .. name])
    if hard and totals[name] > hard then
      return ff.reply('HARD_BREACH', name, used[name] or '0', ff.text(hard))
    end
    if soft and totals[name] > soft and not soft_breach then
      soft_breach = ff.reply('SOFT_BREACH', name, ff.text(totals[name]), ff.text(soft))
    end
  end
  write_totals(usage_key, totals, order)
  -- The charge keeps its amounts, so that it can be taken back.
  local charged = {}
  for _, name in ipairs(order) do
    charged[#charged + 1], charged[#charged + 2] = name, ff.text(amounts[name])
  end
  remember(charges_key, charge_id, cmsgpack.pack(charged), CHARGES)
  call('PEXPIRE', charges_key, window_ms)
  return soft_breach or ff.ok('', '0', '0')
end)

-- ff_release_charge
--   keys:    limits usage charges
--   args:    charge_id
--   returns:
--   errors:
--
-- Takes back a charge whose report was refused by another budget; without such a charge it does nothing.
redis.register_function('ff_release_charge', function(keys, args)
  local _, usage_key, charges_key = unpack(keys, 1, 3)
  local charge_id = args[1]
  local intact, charged = pcall(cmsgpack.unpack, recall(charges_key, charge_id) or '')
  if not intact or type(charged) ~= 'table' then
    return ff.ok()
  end
  local order, totals = {}, {}
  for i = 1, #charged, 2 do
    order[#order + 1] = charged[i]
  end
  local used = ff.hash_fields(usage_key, order)
  for i = 1, #charged, 2 do
    totals[charged[i]] = math.max((ff.integer(used[charged[i]]) or 0) - tonumber(charged[i + 1]), 0)
  end
  write_totals(usage_key, totals, order)
  redis.call('HSET', charges_key, 'id:' .. charge_id, '')
  return ff.ok()
end)
