-- A lock's line, for the scripts that begin with this one.
--
-- <line>                sorted set: the numbers of those who are awake, by number
-- <line>:queue          sorted set: of those who are in their queue, likewise
-- <line>:served         string: how often somebody was let in while somebody was in its queue
--                       (kept for longer than the line: who was in a busy queue asks late)
-- <line>:<number>       string: a place, in JSON: owner_token, task_id, worker, pid,
--                       call; due_ms: when its owner asks by itself, 0 if it is awake; served: as
--                       above, when it came. Expires when the place lapses
-- <line>:<number>:wake  list: gets an item when the lock is handed to the place
--
-- MOST_PASSES, HANDED_OVER_MS, UNTOLD, LINE_LIVES_MS, SERVED_LIVES_MS  see stores/base.py and
-- stores/redis.py

local function now_in_us()
  local time = redis.call("TIME")
  return time[1] * 1000000 + time[2]
end

local function served_so_far(line)
  return tonumber(redis.call("GET", line .. ":served") or 0)
end

local function first_alive(line, members)
  while true do
    local number = redis.call("ZRANGE", members, 0, 0)[1]
    local packed = number and redis.call("GET", line .. ":" .. number)
    if packed then
      return number, cjson.decode(packed)
    elseif not number then
      return nil, nil
    end
    redis.call("ZREM", members, number)
  end
end

-- For whom a free lock is: the number and the place, or nil if it is for the asker or for nobody.
-- And whether anybody is in its queue. own_number and own_served are the asker's, nil if it
-- stands nowhere.
--
-- The first who is awake has it, or the asker. But the first who is in its queue goes before one
-- who came later if it is due (and the other one new), or has seen enough others go first (and
-- the other one has not): the lock is left for it.
local function next_in_line(line, own_number, own_served)
  local number, place = first_alive(line, line)
  local first, served_then = tonumber(number), place and place.served
  if own_number and not (first and first < own_number) then
    number, place, first, served_then = nil, nil, own_number, own_served
  end
  first = first or math.huge
  local queued, absent = first_alive(line, line .. ":queue")
  if not queued then
    return number, place, false
  end
  local served = served_so_far(line)
  local is_due = first == math.huge and absent.due_ms <= now_in_us() / 1000
  local has_seen_enough = served - absent.served >= MOST_PASSES
    and not (served_then and served - served_then >= MOST_PASSES)
  if is_due or has_seen_enough then
    return queued, absent, true
  end
  return number, place, true
end

local function count_served(line)
  redis.call("INCR", line .. ":served")
  redis.call("PEXPIRE", line .. ":served", SERVED_LIVES_MS)
end

-- The number as it was given, "" for none; that of an owner which was not told it is looked for.
local function find_number(line, number, owner_token)
  if tonumber(number) ~= UNTOLD then
    return number
  end
  for _, members in ipairs({line, line .. ":queue"}) do
    for _, member in ipairs(redis.call("ZRANGE", members, 0, -1)) do
      local packed = redis.call("GET", line .. ":" .. member)
      if packed and cjson.decode(packed).owner_token == owner_token then
        return member
      end
    end
  end
  return "0"
end

local function leave_line(line, number)
  redis.call("ZREM", line, number)
  redis.call("ZREM", line .. ":queue", number)
  redis.call("DEL", line .. ":" .. number)
end

-- The lock is the place's from here on, for a moment: whoever wakes up there confirms it.
local function hand_over(lock, line, number, place, is_anybody_queued)
  -- First: when memory is short Redis refuses what needs more, but not once something was written.
  redis.call("ZREM", line, number)
  redis.call("DEL", line .. ":" .. number)
  redis.call("HSET", lock,
    "owner_token", "", "heir", place.owner_token,
    "task_id", place.task_id, "worker", place.worker, "pid", place.pid, "call", place.call or "",
    "since_us", string.format("%.0f", now_in_us()), "fencing_token", 0, "hold_ms", 0)
  redis.call("PEXPIRE", lock, HANDED_OVER_MS)
  local wake = line .. ":" .. number .. ":wake"
  redis.call("LPUSH", wake, 1)
  redis.call("PEXPIRE", wake, HANDED_OVER_MS)
  if is_anybody_queued then
    count_served(line)
  end
end
