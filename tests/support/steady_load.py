"""Requests that keep coming: answers of many lengths, some of which their clients give up.

Owns the clients. What is answered is nobody's business here.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
from collections.abc import AsyncIterator

from kvmesh.client import AsyncClient
from mesh.errors import KvmeshError

PROMPTS = ("In the beginning", "It was a dark and stormy night", "The captain said", "The sea")
MOST_TOKENS = 240
PATIENT_SHARE = 0.9


@contextlib.asynccontextmanager
async def steady_load(address: str, num_clients: int) -> AsyncIterator[None]:
    """For the length of a with block, so many clients ask again whenever they are answered."""
    async with AsyncClient(address) as client:
        asking = [asyncio.ensure_future(_ask(client, number)) for number in range(num_clients)]
        try:
            yield
        finally:
            for task in asking:
                task.cancel()
            ended, _ = await asyncio.wait(asking)
            for task in ended:
                with contextlib.suppress(asyncio.CancelledError):
                    task.result()


async def _ask(client: AsyncClient, number: int) -> None:
    """A gateway that is away is asked again."""
    chance = random.Random(number)
    for seed in itertools.count():
        num_tokens = chance.randint(20, MOST_TOKENS)
        is_patient = chance.random() < PATIENT_SHARE
        with contextlib.suppress(KvmeshError):
            async with client.generate(
                chance.choice(PROMPTS), max_new_tokens=num_tokens, ignore_eos=True, seed=seed
            ) as answer:
                async for _ in answer:
                    if not is_patient:
                        break
        await asyncio.sleep(0.05)
