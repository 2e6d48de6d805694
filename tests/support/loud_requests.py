"""Requests full of canaries to a loud mesh. Owns what is asked and which secrets that makes."""

from __future__ import annotations

import random
import string

from protos import gateway_pb2
from tests.support.canaries import Canaries
from tests.support.generate import Answer, sampled_request
from tests.support.loud_mesh import LoudMesh
from tests.support.streams import Stream

Request = gateway_pb2.GenerateRequest


def metadata(canaries: Canaries) -> list[tuple[str, str]]:
    """What a client sends with every call."""
    return [
        ("authorization", f"Bearer {canaries.add('metadata', 'zqAuthorizationCanary81c5')}"),
        ("x-api-key", canaries.add("metadata", "zqApiKeyCanary40d7")),
    ]


class Asker:
    """Asks, and notes every secret that it tells or hears."""

    def __init__(self, mesh: LoudMesh, canaries: Canaries) -> None:
        self.mesh = mesh
        self.canaries = canaries
        self.rng = random.Random(6)
        self._num_salts = 0
        # Answers are of letters alone: text that would be seen as such anywhere.
        self._letters = self.token_ids(string.ascii_letters)

    def token_ids(self, text: str) -> list[int]:
        """Those of a text."""
        return list(self.mesh.calls.Tokenize(gateway_pb2.TokenizeRequest(text=text)).token_ids)

    def request(self, num_tokens: int = 24, prompt_len: int = 200) -> Request:
        """Sampled, of a tenant of its own."""
        prompt = [self.rng.randrange(256) for _ in range(prompt_len)]
        seed = self.rng.randrange(2**32)
        request = sampled_request(self.canaries.add_ids("prompt", prompt), num_tokens, seed)
        request.sampling.allowed_token_ids.extend(self._letters)
        self._num_salts += 1
        salt = f"zqTenantSecretCanary{self._num_salts:03d}e"
        request.cache_salt = self.canaries.add("tenant", salt)
        stop = f"zqStopStringCanary{self._num_salts:03d}b"
        request.stopping.stop_strings.append(self.canaries.add("stop string", stop))
        return request

    def take(self, stream: Stream) -> Answer:
        """The whole answer."""
        answer = stream.result()
        for index, ids in answer.tokens.items():
            self.canaries.add_ids("output", ids)
            self.canaries.add_output(answer.text[index])
        return answer

    def ask(self, request: Request) -> Answer:
        """The answer to one request."""
        return self.take(self.mesh.stream(request))

    def ask_until(self, key: str, **attributes: str) -> None:
        """Asks fresh prompts until that series has moved."""

        def has_moved() -> bool:
            self.ask(self.request(4))
            return self.mesh.has_moved(key, **attributes)

        self.mesh.wait_until(has_moved, f"{key} {attributes} moves", 60)

    def settle(self) -> None:
        """Waits until the gateway sees everybody ready."""
        self.mesh.wait_until(lambda: all(i.ready for i in self.mesh.instances()), "all ready", 40)
        self.mesh.look()
