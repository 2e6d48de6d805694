"""Minutes of mixed faults at steady load: no wrong, lost or doubled token, no leaked block.

Owns the load, the faults and the count of what went wrong. Workers and stores are killed, frozen,
drained and restarted at random; clients cancel at random; the gateway lives throughout, because its
death is a client's to see. The demo model on a CPU, two of each role. Run it with `--out FILE`.
"""

from __future__ import annotations

import argparse
import collections
import json
import platform
import random
import signal
import threading
import time
from pathlib import Path

import grpc
import torch

from tests.support.books import Books
from tests.support.generate import Answer
from tests.support.injectors import frozen, kill, revive
from tests.support.mesh import ROOT, Mesh, Process, running_mesh
from tests.support.mixture import Mixture, salted
from tests.support.streams import Stream, same_answer

NUM_LOOPS = 3
SAMPLE_S, PAUSE_S = 10.0, (1.0, 5.0)
CANCEL_SHARE = 0.1
VOCAB_SIZE = 4096


class Soak:
    """One run; `counts` says what happened."""

    def __init__(self, mesh: Mesh, seconds: float) -> None:
        self.counts: collections.Counter[str] = collections.Counter()
        self.failures: list[str] = []
        self.memory: list[dict[str, float]] = []
        self._mesh = mesh
        self._mixture = Mixture(mesh, VOCAB_SIZE)
        self._ends_at = time.monotonic() + seconds
        self.books = Books(mesh)

    def run(self) -> None:
        """Load and faults until the time is over, then the books."""
        started_at = time.monotonic()
        loads = [threading.Thread(target=self._load, args=(seed,)) for seed in range(NUM_LOOPS)]
        faults = threading.Thread(target=self._faults)
        for thread in (*loads, faults):
            thread.start()
        while time.monotonic() < self._ends_at:
            self._sample(time.monotonic() - started_at)
            faults.join(min(SAMPLE_S, max(0.0, self._ends_at - time.monotonic())))
        for thread in (*loads, faults):
            thread.join()
        try:
            self.books.settle(timeout_s=180)  # the store keeps what the dead held for its deadlines
        except AssertionError:
            self.failures += self.books.problems
        self._sample(time.monotonic() - started_at)

    def _load(self, seed: int) -> None:
        rng = random.Random(seed)
        mixture = self._mixture
        while time.monotonic() < self._ends_at:
            index = rng.randrange(len(mixture.requests))
            stream = Stream(self._mesh.generation, salted(mixture.requests[index]), timeout_s=120)
            if rng.random() < CANCEL_SHARE:
                threading.Event().wait(rng.random())
                stream.cancel()
                stream.end()
                self.counts["cancelled"] += 1
                continue
            self._judge(stream, mixture.expected[index])

    def _judge(self, stream: Stream, expected: Answer) -> None:
        try:
            answer = stream.result(120)
        except (grpc.RpcError, AssertionError) as failure:
            self._count("lost", str(failure))
            return
        self.counts["tokens"] += stream.num_tokens
        for index, tokens in expected.tokens.items():
            got = answer.tokens.get(index, [])
            if len(got) != len(tokens):
                self._count("doubled" if len(got) > len(tokens) else "lost", f"{len(got)} tokens")
            elif got != tokens:
                self._count("wrong", f"sequence {index}")
        try:
            same_answer(answer, expected)
            self.counts["exact"] += 1
        except AssertionError as failure:
            self._count("different", str(failure))

    def _count(self, what: str, why: str) -> None:
        self.counts[what] += 1
        self.failures.append(f"{what}: {why[:500]}")
        print(self.failures[-1], flush=True)

    def _faults(self) -> None:
        rng = random.Random(99)
        mesh = self._mesh
        while time.monotonic() < self._ends_at:
            victim = rng.choice([*mesh.prefills, *mesh.decodes, *mesh.kvstores])
            fault = rng.choice(("kill", "freeze", "drain"))
            self._do(fault, victim, rng)
            self.counts[f"{fault} {victim.role}"] += 1
            self.books.lose()
            threading.Event().wait(rng.uniform(*PAUSE_S))

    def _do(self, fault: str, victim: Process, rng: random.Random) -> None:
        if fault == "freeze":
            with frozen(self._mesh, victim):
                threading.Event().wait(rng.uniform(0.2, 6.0))
            return
        if fault == "kill":
            kill(victim)
        else:
            victim.popen.send_signal(signal.SIGTERM)
            if victim.popen.wait(60) != 0:
                self._count("unclean end", victim.tail())
        revive(self._mesh, victim)

    def _sample(self, at_s: float) -> None:
        """Resident MiB of the gateway, and of the largest process of each other role."""
        mesh = self._mesh
        groups = {
            "gateway": [mesh.gateway],
            "prefill": mesh.prefills,
            "decode": mesh.decodes,
            "kvstore": mesh.kvstores,
        }
        sample = {"at_s": round(at_s, 1)}
        for role, processes in groups.items():
            sample[role] = round(max(map(_resident_mib, processes)), 1)
        self.memory.append(sample)


def _resident_mib(process: Process) -> float:
    try:
        num_pages = int(Path(f"/proc/{process.popen.pid}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0.0
    return num_pages * 4096 / 2**20


def main() -> None:
    """Parses flags, runs, writes; exit code 1 when anything went wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--out", type=Path, required=True)
    flags = parser.parse_args()
    with running_mesh(
        ROOT / "models" / "demo",
        num_prefill=2,
        num_decode=2,
        num_kvstore=2,
        store_flags=("--private-ttl-s", "20", "--quarantine-s", "10"),
    ) as mesh:
        soak = Soak(mesh, 60 * flags.minutes)
        soak.run()
    bad = ("wrong", "lost", "doubled", "different", "unclean end")
    result = {
        "what": "mixed faults at steady load, demo model, two of each role, CPU",
        "date": time.strftime("%Y-%m-%d"),
        "cpu": platform.machine(),
        "torch": torch.__version__,
        "minutes": flags.minutes,
        "num_loops": NUM_LOOPS,
        **{name: soak.counts[name] for name in bad},
        "leaked": soak.books.problems,
        "counts": dict(sorted(soak.counts.items())),
        "resident_mib": soak.memory,
        "failures": soak.failures[:50],
    }
    flags.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: value for key, value in result.items() if key != "resident_mib"}))
    raise SystemExit(bool(soak.failures))


if __name__ == "__main__":
    main()
