"""Requests of every kind, with the answers of undisturbed runs.

Owns what is asked and what must come back, whatever happens meanwhile. A fresh salt makes a request
compute everything anew: the answer does not depend on it.
"""

from __future__ import annotations

import itertools
import random

from protos import gateway_pb2
from tests.support.generate import Answer, generate, greedy_request, sampled_request
from tests.support.mesh import Mesh
from tests.support.streams import Stream, same_answer

NUM_TOKENS = 200
_SALTS = itertools.count()


class Mixture:
    """Greedy with log probabilities, penalised, several sequences, stop string, least length."""

    def __init__(self, mesh: Mesh, vocab_size: int = 256) -> None:
        rng = random.Random(4)

        def prompt(length: int) -> list[int]:
            return [rng.randrange(vocab_size) for _ in range(length)]

        greedy = greedy_request(prompt(200), NUM_TOKENS)
        greedy.output.logprobs = 2
        penalised = sampled_request(prompt(130), NUM_TOKENS, seed=7)
        penalised.sampling.presence_penalty = 0.5
        penalised.sampling.frequency_penalty = 0.3
        penalised.sampling.repetition_penalty = 1.2
        penalised.sampling.top_k = 40
        several = sampled_request(prompt(64), NUM_TOKENS // 2, seed=11)
        several.sampling.num_sequences = 3
        several.output.logprobs = 1
        self.requests = [greedy, penalised, several, *_stopped(mesh, prompt(65), prompt(300))]
        self.expected = [generate(mesh, salted(request)) for request in self.requests]

    def start(self, mesh: Mesh, *, timeout_s: float = 60.0) -> list[Stream]:
        """One cold call of each kind, all at once."""
        return [
            Stream(mesh.generation, salted(request), timeout_s=timeout_s)
            for request in self.requests
        ]

    def verify(self, streams: list[Stream], timeout_s: float = 60.0) -> None:
        """Waits for all answers; each must be exactly the undisturbed one."""
        for stream, expected in zip(streams, self.expected, strict=True):
            same_answer(stream.result(timeout_s), expected)


def salted(request: gateway_pb2.GenerateRequest) -> gateway_pb2.GenerateRequest:
    """The same request with a salt that nobody used before."""
    copy = gateway_pb2.GenerateRequest()
    copy.CopyFrom(request)
    copy.cache_salt = f"salt-{next(_SALTS)}"
    return copy


def _stopped(
    mesh: Mesh, first: list[int], second: list[int]
) -> tuple[gateway_pb2.GenerateRequest, gateway_pb2.GenerateRequest]:
    """A request that a stop string ends late, and one that may not stop before 80 tokens."""
    by_string = sampled_request(first, NUM_TOKENS, seed=3)
    text = generate(mesh, by_string).text[0]
    middle = len(text) * 3 // 4
    stop = next(
        text[at : at + 6] for at in range(middle, len(text)) if text.find(text[at : at + 6]) == at
    )
    by_string.stopping.stop_strings.append(stop)
    by_string.stopping.min_new_tokens = 20
    by_token = sampled_request(second, NUM_TOKENS, seed=5)
    tokens = generate(mesh, by_token).tokens[0]
    late = next(t for t in tokens[100:] if t in tokens[:80])
    by_token.stopping.stop_token_ids.append(late)
    by_token.stopping.min_new_tokens = 80
    answers: list[Answer] = [generate(mesh, request) for request in (by_string, by_token)]
    assert answers[0].finished[0].stop_string == stop
    assert len(answers[1].tokens[0]) > 80 and answers[1].finished[0].stop_token_id == late
    return by_string, by_token
