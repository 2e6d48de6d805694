"""The request the fault tests send, and reading its stream in parts."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from protos import common_pb2, gateway_pb2
from tests.services.gateway.fake_mesh import expected_tokens

PROMPT = b"It was a dark night"
NUM_TOKENS = 40


def request_for(num_tokens: int = NUM_TOKENS, request_id: str = "") -> gateway_pb2.GenerateRequest:
    return gateway_pb2.GenerateRequest(
        request_id=request_id,
        text=PROMPT.decode(),
        sampling=common_pb2.SamplingParams(seed=3),
        stopping=common_pb2.StoppingParams(max_new_tokens=num_tokens),
    )


EXPECTED = expected_tokens(PROMPT, 3, NUM_TOKENS)


async def read_deltas(responses: AsyncIterator[Any], num_tokens: int = 10**9) -> list[int]:
    """Reads until at least num_tokens have come, or to the end."""
    tokens: list[int] = []
    async for response in responses:
        if response.HasField("delta"):
            tokens.extend(response.delta.token_ids)
        if len(tokens) >= num_tokens:
            break
    return tokens
