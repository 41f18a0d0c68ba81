-- Take the lock if it is free and for us, or answer who has it and stand in line.
--
-- An owner that asks again (its first reply was lost) gets its lease again, with the same
-- fencing token and the full ttl. A lock that is kept after its release (see release.lua) is
-- free for the task id that it is kept for, one that was handed over for its heir, and for
-- nobody else. A free lock that is somebody else's turn is handed over, or left for its owner.
--
-- KEYS[1]  lock key
-- KEYS[2]  the lock's bucket
-- KEYS[3]  the lock's line
-- KEYS[4]  what was reserved for the run beside its lock, or the lock key
-- KEYS[5]  hash: task name -> JSON: the newest of its runs that has had the lock; see succession.lua
-- ARGV[1]  owner token
-- ARGV[2]  ttl in ms
-- ARGV[3]  task id of the claimant
-- ARGV[4]  worker of the claimant
-- ARGV[5]  pid of the claimant
-- ARGV[6]  which call it is, or ""
-- ARGV[7]  number of its place in line, 0 for a new one, UNTOLD for one that may be there
--          already, or "" for none
-- ARGV[8]  the line's count of those who were let in, as of when it first stood there
-- ARGV[9]  ms until its owner asks again by itself, or 0 if it waits to be handed the lock
-- ARGV[10] ms that the place lives
-- ARGV[11] ms that what was reserved is to be kept if the lock is refused
-- ARGV[12] task name under "rerun", else ""
-- ARGV[13] the run's generation, a time in µs, or 0 for now
-- ARGV[14] ms that its generation is remembered once it has the lock
-- Returns  {1, task id, worker, pid, since in µs, fencing token, the bucket's epoch, its
--          generation} of the claimant if acquired, else
--          {0, task id, worker, pid, since in µs, fencing token} of the holder, and then the number
--          of the claimant's place or 0, the line's count as of when it first stood there, how many
--          were let in since, ms until the lock may be free, 1 if it is kept for a retry, 1 if the
--          holder is the same call, the claimant's generation, 1 if it is the newest that is
--          refused, and 1 if a newer one has had the lock, which is the holder then
local own_place = find_number(KEYS[3], ARGV[7], ARGV[1])
local own_number = tonumber(own_place)
if own_number == 0 then
  own_number = nil
end

local has_reserved = false
if KEYS[4] ~= KEYS[1] then
  local reserved = redis.call("HMGET", KEYS[4], "owner_token", "heir", "task_id")
  has_reserved = reserved[1] == "" and reserved[2] == "" and reserved[3] == ARGV[3]
end

local function own_served()
  local served = tonumber(ARGV[8])
  if served > served_so_far(KEYS[3]) then
    return 0  -- the count has begun anew
  end
  return served
end

local function stand_in_line(now_us)
  local due_ms, members = tonumber(ARGV[9]), KEYS[3]
  if due_ms > 0 then
    due_ms, members = math.ceil(now_us / 1000) + due_ms, KEYS[3] .. ":queue"
    redis.call("PEXPIRE", KEYS[3] .. ":served", SERVED_LIVES_MS)
  end
  local served = served_so_far(KEYS[3])
  local place = {
    owner_token = ARGV[1], task_id = ARGV[3], worker = ARGV[4], pid = ARGV[5], call = ARGV[6],
    due_ms = due_ms, served = served,
  }
  local number = own_number or now_us
  if own_number then
    place.served = own_served()
    leave_line(KEYS[3], own_place)
  end
  while not redis.call("SET", KEYS[3] .. ":" .. string.format("%.0f", number),
      cjson.encode(place), "NX", "PX", ARGV[10]) do
    number = number + 1  -- the clock has stepped back
  end
  number = string.format("%.0f", number)
  redis.call("ZADD", members, number, number)
  redis.call("PEXPIRE", members, LINE_LIVES_MS)
  return number, place.served, served - place.served
end

local owner_token, heir, task_id, worker, pid, call, since_us, fencing_token, hold_ms, packed_next,
  follows, kept_generation = unpack(redis.call("HMGET", KEYS[1], "owner_token", "heir", "task_id",
    "worker", "pid", "call", "since_us", "fencing_token", "hold_ms", "next", "follows",
    "generation"))
local is_handed_over = owner_token == "" and heir and heir ~= ""
local is_kept = owner_token == "" and not is_handed_over

local name, generation = ARGV[12], ARGV[13]
if name ~= "" then
  local now_us = now_in_us()
  -- A publisher whose clock is ahead must not keep all others out until theirs are.
  if generation == "0" or tonumber(generation) > now_us then
    generation = string.format("%.0f", now_us)
  end
end
local follows_us = is_kept and name ~= "" and follows == name

-- Whether no newer one of the task was refused; then this one is the next.
local function note_as_next()
  local followers = decoded(packed_next)
  local newest = followers[name]
  if follows_us and tonumber(kept_generation) > tonumber(generation) then
    return false
  elseif newest and tonumber(newest.generation) > tonumber(generation) then
    return false
  elseif redis.call("EXISTS", KEYS[1]) == 1 then
    followers[name] = {
      generation = generation, task_id = ARGV[3], worker = ARGV[4], pid = ARGV[5], call = ARGV[6],
      since_us = newest and newest.since_us or string.format("%.0f", now_in_us()),
    }
    redis.call("HSET", KEYS[1], "next", encoded(followers))
  end
  return true
end

local function superseding()
  local newest = name ~= "" and redis.call("HGET", KEYS[5], name)
  newest = newest and cjson.decode(newest)
  return newest and tonumber(newest.generation) > tonumber(generation) and newest
end

local function note_as_newest()
  redis.call("HSET", KEYS[5], name, cjson.encode({
    generation = generation, task_id = task_id, worker = worker, pid = pid, since_us = since_us,
    fencing_token = fencing_token,
  }))
  redis.call("PEXPIRE", KEYS[5], ARGV[14])
end

local function refuse(holder, call, free_in_ms, is_kept_for_retry, is_superseded)
  local number, served, seen = 0, 0, 0
  local is_with_itself = holder[1] == ARGV[3] and ARGV[3] ~= ""
  if own_place ~= "" and not is_with_itself then
    number, served, seen = stand_in_line(now_in_us())
  end
  if has_reserved then
    redis.call("PEXPIRE", KEYS[4], ARGV[11])
  end
  local is_newest = name ~= "" and not is_superseded and not is_with_itself and note_as_next()
  local task_id, worker, pid, since_us, fencing_token = unpack(holder)
  return {0, task_id, worker, pid, since_us, fencing_token,
    number, served, seen, free_in_ms, is_kept_for_retry and 1 or 0,
    call == ARGV[6] and call ~= "" and 1 or 0,
    generation, is_newest and 1 or 0, is_superseded and 1 or 0}
end

local newest = owner_token ~= ARGV[1] and superseding()
if newest then
  return refuse({newest.task_id, newest.worker, newest.pid, newest.since_us, newest.fencing_token},
    "", 0, false, true)
end
local is_for_us = owner_token == ARGV[1]
  or (is_handed_over and heir == ARGV[1])
  or (is_kept and task_id == ARGV[3] and task_id ~= "")
  or (follows_us and tonumber(kept_generation) <= tonumber(generation))
if owner_token and not is_for_us then
  local is_kept_for_retry = is_kept and tonumber(hold_ms) > 0
  return refuse({task_id, worker, pid, since_us, fencing_token}, call,
    redis.call("PTTL", KEYS[1]), is_kept_for_retry)
end
local bucket_token, epoch = unpack(redis.call("HMGET", KEYS[2], "fencing_token", "epoch"))
if owner_token ~= ARGV[1] then
  local now_us = now_in_us()
  if not owner_token then
    local number, place, is_anybody_queued =
      next_in_line(KEYS[3], own_number, own_number and own_served())
    if place then
      local free_in_ms = HANDED_OVER_MS
      if place.due_ms == 0 then
        hand_over(KEYS[1], KEYS[3], number, place, is_anybody_queued)
      else
        free_in_ms = redis.call("PTTL", KEYS[3] .. ":" .. number)
      end
      return refuse({place.task_id, place.worker, place.pid, number, "0"}, place.call,
        free_in_ms, false)
    end
    if is_anybody_queued then
      count_served(KEYS[3])
    end
  end
  if own_number and not is_handed_over then
    leave_line(KEYS[3], own_place)
  end
  -- The clock keeps the number growing when the counter is lost (R9). Both are below 2^53, so
  -- the doubles of Lua 5.1 are exact; its tostring() is not, hence "%.0f".
  local fencing_before = fencing_token
  fencing_token = string.format("%.0f", math.max(tonumber(bucket_token or 0) + 1, now_us))
  -- When the bucket began. A store that has lost its data begins another one; see restore.lua.
  epoch = epoch or string.format("%.0f", now_us)
  redis.call("HSET", KEYS[2], "fencing_token", fencing_token, "epoch", epoch)
  -- A retry goes on with what its first attempt began. What was reserved begins now.
  if not since_us or (is_kept and fencing_before == "0") then
    since_us = string.format("%.0f", now_us)
  end
  task_id, worker, pid = ARGV[3], ARGV[4], ARGV[5]
  redis.call("HSET", KEYS[1],
    "owner_token", ARGV[1], "heir", "", "task_id", task_id, "worker", worker, "pid", pid,
    "call", ARGV[6], "since_us", since_us, "fencing_token", fencing_token, "hold_ms", 0)
  if follows and follows ~= "" then
    redis.call("HSET", KEYS[1], "follows", "")
  end
  if name ~= "" then
    note_as_newest()
  end
end
local expiry = redis.pcall("PEXPIRE", KEYS[1], ARGV[2])
if type(expiry) == "table" and expiry.err then
  redis.call("DEL", KEYS[1])  -- scripts are not rolled back: it would be held for ever
  return expiry
end
if has_reserved then
  redis.call("DEL", KEYS[4])
end
return {1, task_id, worker, pid, since_us, fencing_token, epoch, generation}
