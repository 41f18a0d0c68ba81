from __future__ import annotations

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
