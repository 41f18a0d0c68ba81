-- Give the lock back if the caller still owns it.
--
-- It is free then, unless it is to be kept: for a retry that was promised it (hold.lua), or
-- because it has not been held for long enough. A kept lock has no owner; only a run of the
-- same task id can take it before it expires.
--
-- KEYS[1]  lock key
-- ARGV[1]  owner token
-- ARGV[2]  ms that the lock is to be kept at least, from when it was taken
-- Returns  1 released, 0 not ours any more (expired, or another run holds it)
local owner_token, since_us, hold_ms =
  unpack(redis.call("HMGET", KEYS[1], "owner_token", "since_us", "hold_ms"))
if owner_token ~= ARGV[1] then
  return 0
end
local keep_ms = tonumber(hold_ms)
local at_least_ms = tonumber(ARGV[2])
if at_least_ms > 0 then
  local time = redis.call("TIME")
  local held_ms = (time[1] * 1000000 + time[2] - since_us) / 1000
  keep_ms = math.max(keep_ms, math.ceil(at_least_ms - held_ms))
end
if keep_ms <= 0 then
  return redis.call("DEL", KEYS[1])
end
redis.call("HSET", KEYS[1], "owner_token", "")
return redis.call("PEXPIRE", KEYS[1], string.format("%.0f", keep_ms))
