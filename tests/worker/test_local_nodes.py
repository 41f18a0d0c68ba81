from __future__ import annotations

from pytest_celery import CeleryTestSetup


def test_a_setup_of_pytest_celery_runs_on_local_processes(celery_setup: CeleryTestSetup):
    assert celery_setup.ready(ping=True, control=True)

    worker = celery_setup.worker
    processes = worker.get_running_processes_info(["pid"])
    assert worker.container.process.pid in [process["pid"] for process in processes]

    # When the worker is killed, and started again
    worker.kill()
    assert worker.container.status == "exited"
    worker.restart()

    assert celery_setup.ready(ping=True)
