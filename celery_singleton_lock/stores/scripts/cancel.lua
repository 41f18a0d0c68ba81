-- Give back what is kept for a task id whose run will not come.
--
-- KEYS[1]  lock key
-- KEYS[2]  the lock's line
-- ARGV[1]  task id
-- ARGV[2]  ms that a lock which was held is to be kept at least, from when it was taken
-- Returns  1 given back, 0 it is neither kept for that task id nor to be
local owner_token, heir, task_id, since_us, fencing_token, packed_next = unpack(
  redis.call("HMGET", KEYS[1], "owner_token", "heir", "task_id", "since_us", "fencing_token",
    "next"))
if owner_token ~= "" or (heir or "") ~= "" or task_id ~= ARGV[1] then
  local followers = decoded(packed_next)
  for name, each in pairs(followers) do
    if each.task_id == ARGV[1] then
      followers[name] = nil
      redis.call("HSET", KEYS[1], "next", encoded(followers))
      return 1
    end
  end
  return 0
end
local keep_ms = 0
if tonumber(fencing_token) > 0 then
  keep_ms = math.ceil(ARGV[2] - (now_in_us() - since_us) / 1000)
end
if keep_ms > 0 then
  redis.call("PEXPIRE", KEYS[1], string.format("%.0f", keep_ms))
  redis.call("HSET", KEYS[1], "hold_ms", 0)
else
  free(KEYS[1], KEYS[2], packed_next)
end
return 1
