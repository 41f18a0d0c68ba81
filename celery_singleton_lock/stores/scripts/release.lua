-- Give the lock back if the caller still owns it, and leave the line.
--
-- It goes to the next in line then, or is free, unless it is to be kept: for a retry that was
-- promised it (hold.lua), or because it has not been held for long enough. A kept lock has no
-- owner; only a run of the same task id can take it before it expires.
--
-- KEYS[1]  lock key
-- KEYS[2]  the lock's line
-- ARGV[1]  owner token
-- ARGV[2]  ms that the lock is to be kept at least, from when it was taken
-- ARGV[3]  number of the place to leave, UNTOLD for one that may be there, or ""
-- Returns  1 released, 0 not ours any more (expired, or another run holds it)
if ARGV[3] ~= "" then
  leave_line(KEYS[2], find_number(KEYS[2], ARGV[3], ARGV[1]))
end
local owner_token, heir, since_us, hold_ms, packed_next =
  unpack(redis.call("HMGET", KEYS[1], "owner_token", "heir", "since_us", "hold_ms", "next"))
local is_never_taken = owner_token == "" and heir == ARGV[1]
if owner_token ~= ARGV[1] and not is_never_taken then
  return 0
end
local keep_ms = tonumber(hold_ms)
local at_least_ms = tonumber(ARGV[2])
if at_least_ms > 0 and not is_never_taken then
  local held_ms = (now_in_us() - since_us) / 1000
  keep_ms = math.max(keep_ms, math.ceil(at_least_ms - held_ms))
end
if keep_ms > 0 then
  -- In this order: see hand_over.
  redis.call("PEXPIRE", KEYS[1], string.format("%.0f", keep_ms))
  redis.call("HSET", KEYS[1], "owner_token", "")
  return 1
end
free(KEYS[1], KEYS[2], packed_next)
return 1
