-- Set the lock's remaining life back to the ttl if the caller still owns it. Never creates.
--
-- KEYS[1]  lock key
-- ARGV[1]  owner token
-- ARGV[2]  ttl in ms
-- Returns  1 renewed, 0 not ours any more (expired, or another run holds it)
if redis.call("HGET", KEYS[1], "owner_token") ~= ARGV[1] then
  return 0
end
return redis.call("PEXPIRE", KEYS[1], ARGV[2])
