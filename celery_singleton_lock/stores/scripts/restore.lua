-- Put back a lock that the store has lost although its run goes on. Never one that was freed.
--
-- What speaks for a loss is the lock's bucket: it is a new one (its epoch is another), or it is
-- behind the lock's own fencing token (the server came back with an old snapshot). The lock
-- keeps its fencing token, and the bucket's is raised to it.
--
-- KEYS[1]  lock key
-- KEYS[2]  the lock's bucket
-- ARGV[1]  owner token
-- ARGV[2]  ttl in ms
-- ARGV[3]  epoch of the bucket when the lock was taken
-- ARGV[4]  task id of the holder
-- ARGV[5]  worker of the holder
-- ARGV[6]  pid of the holder
-- ARGV[7]  since in µs
-- ARGV[8]  fencing token
-- Returns  the bucket's epoch now, or nil if the lock was not put back
local fencing_token, epoch = unpack(redis.call("HMGET", KEYS[2], "fencing_token", "epoch"))
local owner_token = redis.call("HGET", KEYS[1], "owner_token")
if owner_token ~= ARGV[1] then
  local is_behind = tonumber(fencing_token or 0) < tonumber(ARGV[8])
  if owner_token or (epoch == ARGV[3] and not is_behind) then
    return nil
  end
  if not epoch then
    local time = redis.call("TIME")
    epoch = string.format("%.0f", time[1] * 1000000 + time[2])
  end
  if is_behind then
    fencing_token = ARGV[8]
  end
  redis.call("HSET", KEYS[2], "fencing_token", fencing_token, "epoch", epoch)
  redis.call("HSET", KEYS[1],
    "owner_token", ARGV[1], "task_id", ARGV[4], "worker", ARGV[5], "pid", ARGV[6],
    "since_us", ARGV[7], "fencing_token", ARGV[8], "hold_ms", 0)
end
redis.call("PEXPIRE", KEYS[1], ARGV[2])
return epoch
