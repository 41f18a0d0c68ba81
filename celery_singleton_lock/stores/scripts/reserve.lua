-- Keep a free lock for a run that is about to be published, as release.lua does for a retry.
--
-- KEYS[1]  lock key
-- KEYS[2]  the lock's line
-- ARGV[1]  task id of the run
-- ARGV[2]  worker, here: the host of the publisher
-- ARGV[3]  pid of the publisher
-- ARGV[4]  which call it is, or ""
-- ARGV[5]  ms that the lock shall be kept
-- Returns  {1 reserved or 0 not, task id, worker, pid, since in µs, fencing token} of whose it is,
--          1 if that one has the lock by now, and 1 if it is the same call
local owner_token, heir, task_id, worker, pid, call, since_us, fencing_token = unpack(
  redis.call("HMGET", KEYS[1], "owner_token", "heir", "task_id", "worker", "pid", "call",
    "since_us", "fencing_token"))

local function refuse(holder, their_call, is_running)
  local is_same_call = their_call == ARGV[4] and their_call ~= ""
  return {0, holder[1], holder[2], holder[3], holder[4], holder[5],
    is_running and 1 or 0, is_same_call and 1 or 0}
end

local is_ours = owner_token == "" and (heir or "") == "" and task_id == ARGV[1]
if owner_token and not is_ours then
  return refuse({task_id, worker, pid, since_us, fencing_token}, call, owner_token ~= "")
end
if not owner_token then
  local number, place, is_anybody_queued = next_in_line(KEYS[2])
  if place then
    if place.due_ms == 0 then
      hand_over(KEYS[1], KEYS[2], number, place, is_anybody_queued)
    end
    return refuse({place.task_id, place.worker, place.pid, number, "0"}, place.call, false)
  end
  if is_anybody_queued then
    count_served(KEYS[2])
  end
  since_us, fencing_token = string.format("%.0f", now_in_us()), "0"
end
redis.call("HSET", KEYS[1],
  "owner_token", "", "heir", "", "task_id", ARGV[1], "worker", ARGV[2], "pid", ARGV[3],
  "call", ARGV[4], "since_us", since_us, "fencing_token", fencing_token, "hold_ms", ARGV[5])
redis.call("PEXPIRE", KEYS[1], ARGV[5])
return {1, ARGV[1], ARGV[2], ARGV[3], since_us, fencing_token, 0, 1}
