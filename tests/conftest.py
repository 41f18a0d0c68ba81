from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings

# The thorough profile is what CI runs: `tox run -e keys`.
settings.register_profile("default", max_examples=200, deadline=None)
settings.register_profile(
    "thorough",
    max_examples=10_000,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("default")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("random kills", "the long forms are `tox run -e kills,reruns`")
    group.addoption("--child-kills", type=int, default=10, help="killed pool processes")
    group.addoption("--worker-kills", type=int, default=2, help="killed workers")
    group.addoption("--kills-seed", type=int, default=1, help="repeats the plan, not the timing")
    group.addoption("--rerun-rounds", type=int, default=1, help="of updates under kills")
    group.addoption("--rerun-publishes", type=int, default=300, help="updates in each of them")
    group.addoption("--rerun-kills", type=int, default=6, help="kills in each of them")
