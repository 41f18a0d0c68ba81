-- Promise the lock to the next attempt of its owner's task id: release.lua will keep it.
--
-- KEYS[1]  lock key
-- ARGV[1]  owner token
-- ARGV[2]  ms that the lock shall be kept after its release; 0 takes the promise back
-- Returns  1 promised, 0 not ours any more (expired, or another run holds it)
if redis.call("HGET", KEYS[1], "owner_token") ~= ARGV[1] then
  return 0
end
redis.call("HSET", KEYS[1], "hold_ms", ARGV[2])
return 1
