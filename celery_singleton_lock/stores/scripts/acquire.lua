-- Take the lock if it is free, or answer who has it.
--
-- An owner that asks again (its first reply was lost) gets its lease again, with the same
-- fencing token and the full ttl. A lock that is kept after its release (see release.lua) is
-- free for the task id that it is kept for, and for nobody else.
--
-- KEYS[1]  lock key
-- KEYS[2]  the lock's bucket
-- ARGV[1]  owner token
-- ARGV[2]  ttl in ms
-- ARGV[3]  task id of the claimant
-- ARGV[4]  worker of the claimant
-- ARGV[5]  pid of the claimant
-- Returns  {1 acquired or 0 held, task id, worker, pid, since in µs, fencing token}:
--          of the claimant if acquired, else of the holder; then, if acquired, the bucket's epoch
local owner_token, task_id, worker, pid, since_us, fencing_token = unpack(redis.call("HMGET",
  KEYS[1], "owner_token", "task_id", "worker", "pid", "since_us", "fencing_token"))
local is_kept_for_us = owner_token == "" and task_id == ARGV[3] and task_id ~= ""
if owner_token and owner_token ~= ARGV[1] and not is_kept_for_us then
  return {0, task_id, worker, pid, since_us, fencing_token}
end
local bucket_token, epoch = unpack(redis.call("HMGET", KEYS[2], "fencing_token", "epoch"))
if owner_token ~= ARGV[1] then
  local time = redis.call("TIME")
  local now_us = time[1] * 1000000 + time[2]
  -- The clock keeps the number growing when the counter is lost (R9). Both are below 2^53, so
  -- the doubles of Lua 5.1 are exact; its tostring() is not, hence "%.0f".
  fencing_token = string.format("%.0f", math.max(tonumber(bucket_token or 0) + 1, now_us))
  -- When the bucket began. A store that has lost its data begins another one; see restore.lua.
  epoch = epoch or string.format("%.0f", now_us)
  redis.call("HSET", KEYS[2], "fencing_token", fencing_token, "epoch", epoch)
  -- A retry goes on with what its first attempt began.
  since_us = since_us or string.format("%.0f", now_us)
  task_id, worker, pid = ARGV[3], ARGV[4], ARGV[5]
  redis.call("HSET", KEYS[1],
    "owner_token", ARGV[1], "task_id", task_id, "worker", worker, "pid", pid,
    "since_us", since_us, "fencing_token", fencing_token, "hold_ms", 0)
end
local expiry = redis.pcall("PEXPIRE", KEYS[1], ARGV[2])
if type(expiry) == "table" and expiry.err then
  redis.call("DEL", KEYS[1])  -- scripts are not rolled back: it would be held for ever
  return expiry
end
return {1, task_id, worker, pid, since_us, fencing_token, epoch}
