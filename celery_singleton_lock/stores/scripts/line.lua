-- A lock's line, for the scripts that begin with this one.
--
-- <line>                sorted set: the numbers of its places, by number
-- <line>:<number>       string: a place, in JSON: owner_token, task_id, worker, pid; due_ms: when
--                       its owner asks by itself, 0 if it is awake; passes: how often somebody
--                       behind it was let in. Expires when the place lapses
-- <line>:<number>:wake  list: gets an item when the lock is handed to the place
--
-- MOST_PASSES, HANDED_OVER_MS, LINE_LIVES_MS  see stores/base.py and stores/redis.py

local function now_in_us()
  local time = redis.call("TIME")
  return time[1] * 1000000 + time[2]
end

-- For whom a free lock is: the number and the place, or nil if it is for the asker (whose number
-- is nil if it stands nowhere). And the places before it whose owners are not back in time.
local function next_in_line(line, asker)
  local late, now_ms = {}, nil
  while true do
    local number = redis.call("ZRANGE", line, #late, #late)[1]
    if not number or (asker and tonumber(number) >= asker) then
      return nil, nil, late
    end
    local packed = redis.call("GET", line .. ":" .. number)
    if packed then
      local place = cjson.decode(packed)
      now_ms = now_ms or now_in_us() / 1000
      if place.due_ms <= now_ms or place.passes >= MOST_PASSES then
        return number, place, late
      end
      late[#late + 1] = {number, place}
    else
      redis.call("ZREM", line, number)
    end
  end
end

local function note_passes(line, late)
  for _, each in ipairs(late) do
    local number, place = unpack(each)
    place.passes = place.passes + 1
    redis.call("SET", line .. ":" .. number, cjson.encode(place), "KEEPTTL")
  end
end

local function leave_line(line, number)
  redis.call("ZREM", line, number)
  redis.call("DEL", line .. ":" .. number)
end

-- The lock is the place's from here on, for a moment: whoever wakes up there confirms it.
local function hand_over(lock, line, number, place)
  redis.call("HSET", lock,
    "owner_token", "", "heir", place.owner_token,
    "task_id", place.task_id, "worker", place.worker, "pid", place.pid,
    "since_us", string.format("%.0f", now_in_us()), "fencing_token", 0, "hold_ms", 0)
  redis.call("PEXPIRE", lock, HANDED_OVER_MS)
  leave_line(line, number)
  local wake = line .. ":" .. number .. ":wake"
  redis.call("LPUSH", wake, 1)
  redis.call("PEXPIRE", wake, HANDED_OVER_MS)
end
