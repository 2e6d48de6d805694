"""A command on a terminal of its own, as a person runs it: what it shows, keys, its end."""

from __future__ import annotations

import contextlib
import functools
import os
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

PATIENCE_S = 200.0


class Terminal:
    """Starts the command; everything it shows is kept."""

    def __init__(self, words: Sequence[str], *, cwd: Path, env: Mapping[str, str]) -> None:
        self._ours, theirs = os.openpty()
        self._process = subprocess.Popen(
            words, cwd=cwd, env=env, preexec_fn=functools.partial(os.login_tty, theirs)
        )
        os.close(theirs)
        self._shown = b""
        self._more = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def shown(self) -> str:
        """All of it so far."""
        return self._shown.decode(errors="replace")

    def wait_for(self, text: str) -> None:
        """Until it shows the text; AssertionError with all that it showed if it ends before."""
        deadline = time.monotonic() + PATIENCE_S
        with self._more:
            while text not in self.shown:
                is_alive = self._reader.is_alive() and time.monotonic() < deadline
                assert is_alive, f"no {text!r} in:\n{self.shown}"
                self._more.wait(1.0)

    def end(self, keys: str) -> int:
        """Types the keys, which shall end the command; returns its exit code."""
        os.write(self._ours, keys.encode())
        try:
            return self._process.wait(PATIENCE_S)
        finally:
            self.close()

    def close(self) -> None:
        """Kills the command if it still runs."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        self._process.wait()
        self._reader.join(PATIENCE_S)
        with contextlib.suppress(OSError):
            os.close(self._ours)

    def _read(self) -> None:
        """Until the last process on the terminal has ended, which Linux reports as an error."""
        with contextlib.suppress(OSError):
            while data := os.read(self._ours, 65536):
                with self._more:
                    self._shown += data
                    self._more.notify_all()
