-- Who has a lock next, for the scripts that begin with line.lua and this one.
--
-- <lock>, field next     JSON: task name -> the newest of its runs that met the lock under "rerun":
--                        generation, task_id, worker, pid, call; since_us: when the first of them
--                        met it. All strings: cjson would round the numbers
-- <lock>, field follows  the task name, if the lock is kept for such a run, whose generation is in
--                        the field generation
--
-- FOLLOW_UP_MS           see stores/base.py

local function decoded(packed)
  return packed and packed ~= "" and cjson.decode(packed) or {}
end

local function encoded(followers)
  return next(followers) and cjson.encode(followers) or ""
end

local function first_follower(followers)
  local first, first_name
  for name, each in pairs(followers) do
    if not first or tonumber(each.since_us) < tonumber(first.since_us) then
      first, first_name = each, name
    end
  end
  return first_name, first
end

local function keep_for_follower(lock, followers, name)
  local run = followers[name]
  followers[name] = nil
  redis.call("PEXPIRE", lock, FOLLOW_UP_MS)  -- in this order: see hand_over
  redis.call("HSET", lock,
    "owner_token", "", "heir", "", "task_id", run.task_id, "worker", run.worker, "pid", run.pid,
    "call", run.call, "since_us", string.format("%.0f", now_in_us()), "fencing_token", "0",
    "hold_ms", FOLLOW_UP_MS, "next", encoded(followers), "follows", name,
    "generation", run.generation)
end

-- The lock is a follow-up's, or the first one's who is awake in its line, whoever came first; or
-- nobody's. packed_next is its field.
local function free(lock, line, packed_next)
  local number, place, is_anybody_queued = next_in_line(line)
  local followers = decoded(packed_next)
  local name, run = first_follower(followers)
  if name and not (place and tonumber(number) < tonumber(run.since_us)) then
    keep_for_follower(lock, followers, name)
  elseif place and place.due_ms == 0 then
    hand_over(lock, line, number, place, is_anybody_queued)
  else
    redis.call("DEL", lock)
  end
end
