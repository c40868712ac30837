"""Runs of whole lanes that end, or fail the test."""

from __future__ import annotations

import threading

from stormline.pipeline.supervisor import Supervisor

RUN_LIMIT_S = 120


def run_within(supervisor, limit_s, on_status=lambda status: None):
    """Run a supervisor to its end; return its status. Fails where it had to be stopped."""
    alarm = threading.Timer(limit_s, supervisor.request_stop)
    alarm.daemon = True
    alarm.start()
    try:
        status = supervisor.run(on_status=on_status)
        assert alarm.is_alive(), f"not done after {limit_s} s: {status}"
    finally:
        alarm.cancel()
    return status


def run_until_idle(
    settings, idle_s=2.0, *, on_status=lambda status: None, done=lambda status: True, limit_s=RUN_LIMIT_S
):
    """Run until nothing has come for a while and `done` agrees, by the status of that moment."""
    supervisor = Supervisor(settings)

    def watch(status):
        on_status(status)
        if status.lag_records == 0 and status.idle_s >= idle_s and done(status):
            supervisor.request_stop()

    return run_within(supervisor, limit_s, watch)
