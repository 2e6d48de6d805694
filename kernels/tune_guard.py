"""Work in a process of its own, which is ended when one of its attempts hangs or crashes.

Owns the processes and the set of attempts that never came back. Never knows what an attempt is:
a configuration that waits for itself on the GPU then costs a tuner seconds, not the whole search.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

SILENT_S = 30.0
"""An attempt compiles, checks and times one configuration."""
START_S = 120.0
"""Until the first attempt: imports, random inputs, a reference."""


@dataclass(slots=True, kw_only=True)
class Watch:
    """The working process's side; `lost`: attempts that did not come back in a process before."""

    lost: frozenset[Hashable]
    connection: Connection

    def begins(self, attempt: Hashable) -> bool:
        """Says that the attempt begins now. False: leave it out, it is lost."""
        if attempt in self.lost:
            return False
        self.connection.send((attempt, None))
        return True


@dataclass(slots=True, kw_only=True)
class Guard:
    """Runs work(task, watch) task by task, each to its result, without the lost attempts."""

    work: Callable[[Any, Watch], Any]
    lost: set[Hashable] = field(default_factory=set)
    silent_s: float = SILENT_S
    start_s: float = START_S

    def results(self, tasks: Sequence[Any]) -> Iterator[Any]:
        """In the order of tasks. RuntimeError if a process ends before its first attempt."""
        left = list(tasks)
        while left:
            for result in self._until_lost(left):
                left.pop(0)
                yield result

    def _until_lost(self, tasks: list[Any]) -> Iterator[Any]:
        """Results of one process, which adds to `lost` if it does not reach the last."""
        spawn = multiprocessing.get_context("spawn")
        receiver, sender = spawn.Pipe(duplex=False)
        arguments = (self.work, list(tasks), frozenset(self.lost), sender)
        process = spawn.Process(target=_work_off, args=arguments, daemon=True)
        process.start()
        sender.close()
        attempt: Hashable = None
        num_left = len(tasks)
        try:
            while num_left:
                if not receiver.poll(self.start_s if attempt is None else self.silent_s):
                    break
                begun, result = receiver.recv()
                attempt = begun or attempt
                if begun is None:
                    num_left -= 1
                    yield result
        except EOFError:
            pass
        finally:
            process.kill()
            process.join()
            receiver.close()
        if not num_left:
            return
        if attempt is None:
            raise RuntimeError(f"a process ended before its first attempt, see above: {tasks[0]}")
        self.lost.add(attempt)


def _work_off(
    work: Callable[[Any, Watch], Any],
    tasks: list[Any],
    lost: frozenset[Hashable],
    sender: Connection,
) -> None:
    watch = Watch(lost=lost, connection=sender)
    for task in tasks:
        sender.send((None, work(task, watch)))
