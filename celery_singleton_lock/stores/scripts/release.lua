-- Free the lock if the caller still owns it.
--
-- KEYS[1]  lock key
-- ARGV[1]  owner token
-- Returns  1 released, 0 not ours any more (expired, or another run holds it)
if redis.call("HGET", KEYS[1], "owner_token") ~= ARGV[1] then
  return 0
end
return redis.call("DEL", KEYS[1])
