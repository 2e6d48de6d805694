"""What the mesh serves, as its workers tell it.

Owns the choice of the model that new requests use: prefill and decode must agree on its
fingerprint. Pure values; never talks to a worker.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from protos import status_pb2


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """One model as clients see it; `context_len` is the least of its workers'."""

    name: str
    architecture: str
    context_len: int
    vocab_size: int
    fingerprint: bytes
    eos_token_ids: tuple[int, ...]


def served_model(
    name: str,
    prefills: Iterable[status_pb2.WorkerModel],
    decodes: Iterable[status_pb2.WorkerModel],
) -> ServedModel | None:
    """The model that both kinds of workers hold, the one with most workers if there are several."""
    by_fingerprint: dict[bytes, tuple[list[status_pb2.WorkerModel], ...]] = {}
    for kind, models in enumerate((prefills, decodes)):
        for model in models:
            by_fingerprint.setdefault(model.fingerprint, ([], []))[kind].append(model)
    shared = [(fp, both) for fp, both in by_fingerprint.items() if all(both)]
    if not shared:
        return None
    fingerprint, (ours, theirs) = max(shared, key=lambda item: (sum(map(len, item[1])), item[0]))
    workers = [*ours, *theirs]
    first = workers[0]
    return ServedModel(
        name=name,
        architecture=first.architecture,
        context_len=min(worker.context_len for worker in workers),
        vocab_size=first.vocab_size,
        fingerprint=fingerprint,
        eos_token_ids=tuple(first.eos_token_ids),
    )
