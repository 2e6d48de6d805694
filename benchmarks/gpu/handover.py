"""Hand-over of a prompt's KV on one GPU: prefill, store and decode as three processes.

    python -m benchmarks.gpu.handover [--write]

Timed: from the end of the prompt's last kernel (when its results are on the host, as prefill says
on the clock that all processes here share) until the caller reads from the decode rank that KV is
in place and verified. All messages between the three are in it. The rank is chosen, and its Lookup
waits, while the prompt is computed, as with the gateway. Each prompt is one chunk, so all its
blocks move after it (with smaller chunks most would move while the next chunk computes).
Qwen3-8B-shaped random weights, FP8, KV bf16; first a greedy answer is compared with that of a
prompt whose KV was computed on the decode rank itself.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import secrets
import shutil
import statistics
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import grpc

from benchmarks.gpu.engine_case import QWEN3_8B, prompts_of
from benchmarks.gpu.timing import Result, print_table
from kvmesh.launcher import Launcher
from kvmesh.options import MeshOptions
from kvmesh.plan import MeshPlan, plan_mesh
from protos import common_pb2, decode_pb2, decode_pb2_grpc, prefill_pb2, prefill_pb2_grpc

TOKENIZER = Path(__file__).resolve().parents[2] / "models" / "demo"
LENGTHS = (2048, 8192)
# Milliseconds, median: (must, aim).
TARGETS = {2048: (3.0, 1.0), 8192: (8.0, None)}
NUM_RUNS, NUM_TOKENS = 21, 16
_BLOCK_NUM_BYTES = 2 * 36 * 8 * 128 * 2 * 64


@dataclass(frozen=True, slots=True, kw_only=True)
class HandOver:
    """One prompt's: seconds in all, until prefill's answer, from Admit on; its tokens."""

    total_s: float
    put_s: float
    get_s: float
    num_pulled: int
    token_ids: list[int]


class Ends:
    """The two services, spoken to as the gateway does."""

    def __init__(self, prefill: grpc.aio.Channel, decode: grpc.aio.Channel) -> None:
        self._prefill = prefill_pb2_grpc.PrefillServiceStub(prefill)
        self._session = decode_pb2_grpc.DecodeServiceStub(decode).Session()
        self._handle = 0

    async def hand_over(self, prompt: list[int], *, cold: bool = False) -> HandOver:
        """Prefill and prefetch, then decode. cold: the rank gets no hand-off and another salt, so
        that it recomputes.
        """
        self._handle += 1
        sampling = common_pb2.SamplingParams(temperature=0.0)
        stopping = common_pb2.StoppingParams(max_new_tokens=NUM_TOKENS, ignore_eos=True)
        state = common_pb2.SequenceState(seed=1)
        request = prefill_pb2.PrefillRequest(
            prompt_token_ids=prompt,
            sequences=[state],
            sampling=sampling,
            stopping=stopping,
            tail_key=secrets.token_bytes(32),
        )
        finished = await self._finished(request, prefetches=not cold)
        state.output_token_ids.append(finished.first_tokens[0].token_id)
        admit = decode_pb2.Admit(
            handle=self._handle,
            prompt_token_ids=prompt,
            sequences=[state],
            sampling=sampling,
            stopping=stopping,
            handoff=None if cold else finished.handoff,
            cache_salt="cold" if cold else "",
        )
        admitted, admitted_at, tokens = await self._decode(admit)
        return HandOver(
            total_s=admitted_at - finished.computed_at,
            put_s=finished.put_s,
            get_s=admitted.get_s,
            num_pulled=admitted.num_pulled_tokens,
            token_ids=[*state.output_token_ids, *tokens],
        )

    async def _finished(
        self, request: prefill_pb2.PrefillRequest, *, prefetches: bool
    ) -> prefill_pb2.PrefillFinished:
        """Prefill's answer; the rank begins to pull when its last chunk is under way."""
        call = self._prefill.Prefill(request)
        async for event in call:
            if event.HasField("closing") and prefetches:
                prefetch = decode_pb2.Prefetch(
                    handle=self._handle,
                    prompt_token_ids=request.prompt_token_ids,
                    handoff=event.closing.handoff,
                )
                await self._session.write(decode_pb2.SessionRequest(prefetch=prefetch))
            elif event.HasField("finished"):
                call.cancel()
                return event.finished
        raise RuntimeError("prefill ended without an answer")

    async def _decode(
        self, admit: decode_pb2.Admit
    ) -> tuple[decode_pb2.Admitted, float, list[int]]:
        """How and when the request was admitted, and its tokens."""
        await self._session.write(decode_pb2.SessionRequest(admit=admit))
        admitted, admitted_at = decode_pb2.Admitted(), 0.0
        tokens: list[int] = []
        while len(tokens) < NUM_TOKENS - 1:
            message = await self._session.read()
            if message.rejected:
                raise RuntimeError(message.rejected[0].message)
            if message.admitted:
                admitted, admitted_at = message.admitted[0], time.monotonic()
            for output in message.outputs:
                tokens += output.token_ids
        return admitted, admitted_at, tokens


def mesh_of(model: Path) -> MeshPlan:
    """One of each service; the largest prompt is one chunk."""
    return plan_mesh(
        MeshOptions(
            model=model,
            port=0,
            admin_port=0,
            device="cuda",
            dtype="fp8",
            load_format="dummy",
            kv_bytes="8GiB",
            store_bytes="12GiB",
            chunk_tokens=max(LENGTHS),
            max_batch=16,
            log_level="warning",
        )
    )


@contextlib.asynccontextmanager
async def running(plan: MeshPlan) -> AsyncIterator[Ends]:
    """The mesh's two ends while it runs."""
    launcher = Launcher(plan, lambda name, line: print(f"  {name}: {line}", flush=True))
    await launcher.start()
    prefill, decode = (worker.address for worker in plan.workers)
    try:
        async with (
            grpc.aio.insecure_channel(prefill) as one,
            grpc.aio.insecure_channel(decode) as other,
        ):
            yield Ends(one, other)
    finally:
        await launcher.stop()


async def measure(model: Path) -> list[dict[str, object]]:
    """One row a length; ValueError if tokens depend on where the KV came from."""
    rows: list[dict[str, object]] = []
    async with running(mesh_of(model)) as ends:
        for length in LENGTHS:
            prompts = prompts_of(NUM_RUNS + 3, length, QWEN3_8B["vocab_size"], seed=length)
            for prompt in prompts[:2]:
                warm, cold = await ends.hand_over(prompt), await ends.hand_over(prompt, cold=True)
                if warm.num_pulled < length - 1 or cold.num_pulled:
                    raise ValueError(f"pulled {warm.num_pulled} and {cold.num_pulled} tokens")
                if warm.token_ids != cold.token_ids:
                    raise ValueError("tokens depend on where the KV was computed")
            runs = [await ends.hand_over(prompt) for prompt in prompts[3:]]
            rows.append(_row(length, runs))
    return rows


def _row(length: int, runs: list[HandOver]) -> dict[str, object]:
    totals = sorted(run.total_s * 1e3 for run in runs)
    must, aim = TARGETS[length]
    num_bytes = length // 64 * _BLOCK_NUM_BYTES
    put_ms = statistics.median(run.put_s for run in runs) * 1e3
    get_ms = statistics.median(run.get_s for run in runs) * 1e3
    return {
        "tokens": length,
        "mb": num_bytes / 1e6,
        "p50_ms": statistics.median(totals),
        "max_ms": totals[-1],
        "put_ms": put_ms,
        "get_ms": get_ms,
        "gb_per_s": num_bytes / statistics.median(totals) / 1e6,
        "must_ms": must,
        "aim_ms": aim or "",
        "ratio": must / statistics.median(totals),
    }


def main() -> None:
    """Measures and prints; --write keeps the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(TOKENIZER / name, folder)
        (Path(folder) / "config.json").write_text(json.dumps(QWEN3_8B))
        rows = asyncio.run(measure(Path(folder)))
    print_table("hand-over on one GPU", rows)
    if options.write:
        what = "hand-over of a prompt's KV, prefill to decode through the store, one GPU"
        print(Result(name="handover", what=what, rows=rows).write())


if __name__ == "__main__":
    main()
