"""A service for the launcher's tests: `fake_service.py NAME JOURNAL MODE`, without gRPC or model.

Modes: ready (serves until SIGTERM), broken (ends before it is ready), stubborn (ignores SIGTERM).
Each event is a line in the journal, so that order can be asserted.
"""

from __future__ import annotations

import os
import signal
import sys

name, journal, mode = sys.argv[1:4]


def note(event: str) -> None:
    with open(journal, "a") as file:
        file.write(f"{event} {name}\n")


if mode == "broken":
    print("cannot find the model", file=sys.stderr)
    sys.exit(3)
signals = {signal.SIGTERM}
signal.pthread_sigmask(signal.SIG_BLOCK, signals)
note("start")
print("x" * 3_000_000 if mode == "chatty" else "a log line", flush=True)
print(f"kvmesh-ready role={name} address=127.0.0.1:1 incarnation=life-{os.getpid()}", flush=True)
while signal.sigwait(signals):
    note("term")
    if mode != "stubborn":
        sys.exit(0)
