"""A search goes on without the attempt that hung or took its process down."""

from __future__ import annotations

import os
import threading

import pytest

from kernels.tune_guard import Guard, Watch

TASKS = [("one", ()), ("two", ("good", "hangs", "crashes", "last")), ("three", ("good",))]


def work(task: tuple[str, tuple[str, ...]], watch: Watch) -> list[str]:
    """The task's name and its attempts that came back."""
    name, attempts = task
    done = [name]
    for attempt in attempts:
        if not watch.begins((name, attempt)):
            continue
        if attempt == "hangs":
            threading.Event().wait()
        if attempt == "crashes":
            os._exit(1)
        done.append(attempt)
    return done


def test_every_task_has_its_result_without_what_never_came_back() -> None:
    guard = Guard(work=work, silent_s=1.0)
    assert list(guard.results(TASKS)) == [["one"], ["two", "good", "last"], ["three", "good"]]
    assert guard.lost == {("two", "hangs"), ("two", "crashes")}


def test_what_was_lost_before_is_not_tried_again() -> None:
    lost = {("two", "hangs"), ("two", "crashes")}
    guard = Guard(work=work, lost=set(lost))
    assert list(guard.results(TASKS[1:2])) == [["two", "good", "last"]]
    assert guard.lost == lost


def fails(task: str, watch: Watch) -> None:
    raise ValueError(task)


def test_a_process_that_cannot_begin_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="first attempt.*head"):
        list(Guard(work=fails).results(["head"]))
