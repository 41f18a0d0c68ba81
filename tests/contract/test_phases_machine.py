"""What is reserved for a run that has died."""

from __future__ import annotations

import pytest

from phase_fleet import Fleet, Run, dies_once_it_is_stored, in_ticks

LIFETIME, QUEUED = "lifetime", "queued_and_running"


@pytest.fixture(params=[LIFETIME, QUEUED])
def fleet(request, redis_server, monkeypatch):
    in_ticks(monkeypatch)
    fleet = Fleet(redis_server, request.param)
    yield fleet
    fleet.close()


@pytest.mark.parametrize("is_lost", [True, False])
def test_nobody_waits_for_a_copy_of_a_run_that_died_with_its_success_stored(fleet, is_lost):
    fleet.publish()
    [delivery] = fleet.published()
    run = Run(delivery, fleet.request(delivery))
    assert run.begins()
    run.does(dies_once_it_is_stored)

    fleet.tell_of_death(run.request, is_lost=is_lost)

    assert not fleet.publish().is_duplicate
