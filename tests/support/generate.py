"""Collects a Generate stream into plain values, for tests."""

from __future__ import annotations

from dataclasses import dataclass, field

from protos import common_pb2, gateway_pb2
from tests.support.mesh import Mesh

TIMEOUT_S = 60.0


@dataclass
class Answer:
    """One whole answer."""

    info: gateway_pb2.PromptInfo | None = None
    tokens: dict[int, list[int]] = field(default_factory=dict)
    text: dict[int, str] = field(default_factory=dict)
    logprobs: dict[int, list[common_pb2.PositionLogprobs]] = field(default_factory=dict)
    finished: dict[int, gateway_pb2.Finished] = field(default_factory=dict)
    usage: gateway_pb2.Usage | None = None
    num_deltas: int = 0

    def add(self, response: gateway_pb2.GenerateResponse) -> None:
        """Takes one message."""
        event = response.WhichOneof("event")
        if event == "prompt_info":
            assert self.info is None, "prompt_info came twice"
            self.info = response.prompt_info
        elif event == "delta":
            index = response.delta.sequence_index
            self.num_deltas += 1
            self.tokens.setdefault(index, []).extend(response.delta.token_ids)
            self.text[index] = self.text.get(index, "") + response.delta.text
            self.logprobs.setdefault(index, []).extend(response.delta.logprobs)
        elif event == "finished":
            assert response.finished.sequence_index not in self.finished
            self.finished[response.finished.sequence_index] = response.finished
        else:
            self.usage = response.usage


def greedy_request(prompt: list[int], num_tokens: int) -> gateway_pb2.GenerateRequest:
    """A greedy request of exactly num_tokens tokens."""
    return gateway_pb2.GenerateRequest(
        token_ids=gateway_pb2.TokenIds(ids=prompt),
        sampling=common_pb2.SamplingParams(temperature=0),
        stopping=common_pb2.StoppingParams(max_new_tokens=num_tokens, ignore_eos=True),
    )


def sampled_request(prompt: list[int], num_tokens: int, seed: int) -> gateway_pb2.GenerateRequest:
    """A sampled request of exactly num_tokens tokens."""
    request = greedy_request(prompt, num_tokens)
    request.sampling.temperature = 1.0
    request.sampling.top_p = 0.95
    request.sampling.seed = seed
    return request


def generate(mesh: Mesh, request: gateway_pb2.GenerateRequest) -> Answer:
    """Runs one request to its end."""
    answer = Answer()
    for response in mesh.generation.Generate(request, timeout=TIMEOUT_S):
        answer.add(response)
    return answer


def generate_through_a_kill(
    mesh: Mesh, request: gateway_pb2.GenerateRequest, *, after: int
) -> Answer:
    """Kills the decode rank that works once `after` tokens have come; the answer as it ends."""
    answer = Answer()
    killed = False
    for response in mesh.generation.Generate(request, timeout=TIMEOUT_S):
        answer.add(response)
        if not killed and len(answer.tokens.get(0, [])) >= after:
            busy = [p for p in mesh.decodes if mesh.status(p.address).counts.num_requests]
            busy[0].popen.kill()
            killed = True
    assert killed, f"the answer ended before {after} tokens"
    return answer
