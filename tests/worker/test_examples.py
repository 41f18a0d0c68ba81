"""The examples do what their pages say: each is run as its reader runs it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import redis

EXAMPLES = Path(__file__).parents[2] / "examples"
PNG = b"\x89PNG\r\n\x1a\n"

#: Seconds that a run may take: far more than it needs, also on a machine that is busy.
LONGEST_RUN = 300

SMALL_SALE = ("--buyers=40", "--tickets=5", "--slots=2", "--think=30")


@pytest.fixture(scope="module")
def sale(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The picture's folder and the figures of one small sale, run in all ways."""
    folder = tmp_path_factory.mktemp("sale")
    return folder, figures(run("flash_sale", *SMALL_SALE, f"--output={folder}"))


@pytest.fixture(scope="module")
def beat(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, Any]]]:
    """The pictures' folder and the figures of both parts, by name."""
    folder = tmp_path_factory.mktemp("beat")
    runs = figures(run("beat_overlap", "--seconds=4", "--away=3", f"--output={folder}"))
    return folder, {each["name"]: each for each in runs}


@pytest.fixture
def shared_url(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A server that is not the example's own."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    from redis_server import RedisServer, given_url

    url = given_url()
    if url:
        yield url
    else:
        with RedisServer() as server:
            yield server.url()


def test_a_plain_task_oversells(sale):
    _, (plain, *_) = sale

    assert plain["name"] == "plain Task"
    assert plain["served"] == 40
    assert plain["oversold"] == plain["sold"] - 5 > 0
    assert plain["overlaps"] > 0
    assert plain["lock_commands"] in (0, None)


@pytest.mark.parametrize("name", ["SingletonTask", "SingletonTask, requeue"])
def test_singleton_task_sells_what_there_is_and_drops_no_buyer(sale, name):
    _, runs = sale
    (singleton,) = (each for each in runs if each["name"] == name)

    assert (singleton["served"], singleton["sold"]) == (40, 5)
    assert (singleton["oversold"], singleton["overlaps"]) == (0, 0)


def test_no_sale_with_a_lock_is_faster_than_its_buyers_think_one_after_the_other(sale):
    _, (_, *with_a_lock) = sale

    assert all(each["times_ideal"] > 1 for each in with_a_lock)
    assert all(each["inside"] < each["seconds"] for each in with_a_lock)


def test_the_spin_lock_is_right_when_nothing_goes_wrong(sale):
    _, (*_, spin) = sale

    assert (spin["served"], spin["sold"], spin["overlaps"]) == (40, 5, 0)
    # SETNX, EXPIRE and DEL; how often it asks in vain is a matter of time.
    assert spin["lock_commands"] is None or spin["lock_commands"] >= 3


def test_the_sale_leaves_a_picture(sale):
    folder, _ = sale

    assert (folder / "flash-sale.png").read_bytes().startswith(PNG)


def test_a_sale_on_a_shared_server_counts_no_commands_and_leaves_no_key(shared_url, tmp_path):
    # Given a server on which there are other keys
    with redis.Redis.from_url(shared_url) as client:
        before = set(client.keys("*"))

        # When a sale uses it
        options = (*SMALL_SALE, "--only=singleton", f"--output={tmp_path}")
        (singleton,) = figures(run("flash_sale", *options, SINGLETON_REDIS_URL=shared_url))

        assert singleton["lock_commands"] is None
        assert singleton["sold"] == 5
        assert not [key for key in set(client.keys("*")) - before if b"flash-sale" in key]


def test_beat_without_a_lock_starts_a_copy_before_the_last_one_has_ended(beat):
    _, runs = beat

    assert runs["plain Task"]["most_at_once"] >= 2


@pytest.mark.parametrize("name", ["SingletonTask", "SingletonTask, away"])
def test_beat_with_a_lock_never_has_two_copies(beat, name):
    _, runs = beat

    assert runs[name]["most_at_once"] == 1
    assert runs[name]["overlaps"] == 0
    assert runs[name]["skipped"] > 0


def test_what_waited_too_long_ends_as_expired(beat):
    _, runs = beat

    assert runs["SingletonTask, away"]["expired"] == 0
    assert runs["SingletonTask + expires, away"]["expired"] > 0
    assert runs["SingletonTask + expires, away"]["overlaps"] == 0


def test_every_firing_of_beat_is_accounted_for(beat):
    _, runs = beat

    assert len(runs) == 5
    for each in runs.values():
        assert each["fired"] == each["ran"] + each["skipped"] + each["expired"], each


@pytest.mark.parametrize("picture", ["beat-overlap.png", "beat-away.png"])
def test_beat_leaves_pictures(beat, picture):
    folder, _ = beat

    assert (folder / picture).read_bytes().startswith(PNG)


@pytest.mark.parametrize(
    ("module", "option", "message"),
    [
        ("flash_sale", "--buyers=0", "--buyers: must be 1 to"),
        ("flash_sale", "--buyers=many", "--buyers: invalid whole number value: 'many'"),
        ("flash_sale", "--think=-1", "--think: must be 0 to"),
        ("flash_sale", "--only=luck", "--only: invalid choice: 'luck'"),
        ("flash_sale", f"--output={__file__}", "is no folder that can be written to"),
        ("beat_overlap", "--seconds=1", "--seconds: must be 4 to"),
        ("beat_overlap", "--away=soon", "--away: invalid number value: 'soon'"),
    ],
)
def test_wrong_input_is_refused_at_once(module, option, message):
    refused = run(module, option)

    assert refused.returncode == 2
    assert message in refused.stderr
    assert "Traceback" not in refused.stderr


@pytest.mark.parametrize(
    ("module", "options", "under_way"),
    [
        ("flash_sale", ("--buyers=2000",), "plain Task: the sale begins"),
        ("beat_overlap", ("--seconds=60",), "fired"),
    ],
)
def test_ctrl_c_ends_everything(module, options, under_way, tmp_path):
    # Given an example that is under way
    with start(module, *options, f"--output={tmp_path}") as process:
        wait_for_line(process, under_way)
        started = psutil.Process(process.pid).children(recursive=True)

        # When the reader has seen enough
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=LONGEST_RUN)

    assert process.returncode == 130
    assert errors == ""
    assert len(started) > 4  # workers, their pools, a server
    assert_gone(started)


def run(module: str, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run an example to its end."""
    return subprocess.run(
        [sys.executable, "-m", module, *options],
        env=example_environment(**environment),
        capture_output=True,
        text=True,
        timeout=LONGEST_RUN,
        check=False,
    )


def start(module: str, *options: str) -> subprocess.Popen[str]:
    """Start an example, its output in pipes."""
    return subprocess.Popen(
        [sys.executable, "-m", module, *options],
        env=example_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def example_environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(EXAMPLES), **more}


def figures(run: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    """What the example says to scripts, in the last line of its output."""
    assert run.returncode == 0, run.stdout + run.stderr
    return json.loads(run.stdout.splitlines()[-1])["runs"]


def wait_for_line(process: subprocess.Popen[str], part: str) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if part in line:
            return
    raise AssertionError(f"It ended before it said {part!r}")


def assert_gone(processes: list[psutil.Process]) -> None:
    """Fail if one of them still runs a few seconds from now; a corpse does not run."""
    deadline = time.monotonic() + 10
    while left := [process for process in processes if is_alive(process)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
