"""A gateway in the test's loop, over fakes."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest

from protos import common_pb2, gateway_pb2, gateway_pb2_grpc
from services.gateway.process import Gateway
from services.gateway.settings import GatewaySettings
from services.gateway.tokenizer import Tokenizer
from tests.services.gateway.fake_decode import FakeDecode
from tests.services.gateway.fake_mesh import (
    FakePrefill,
    FakeStore,
    write_byte_tokenizer,
)
from tests.support.meters import Meters


@dataclass
class Answer:
    """One whole answer."""

    events: list[str] = field(default_factory=list)
    info: gateway_pb2.PromptInfo | None = None
    tokens: dict[int, list[int]] = field(default_factory=dict)
    text: dict[int, str] = field(default_factory=dict)
    logprobs: list[common_pb2.PositionLogprobs] = field(default_factory=list)
    finished: dict[int, gateway_pb2.Finished] = field(default_factory=dict)
    usage: gateway_pb2.Usage | None = None

    def add(self, response: gateway_pb2.GenerateResponse) -> None:
        event = response.WhichOneof("event")
        assert event is not None
        self.events.append(event)
        if event == "prompt_info":
            self.info = response.prompt_info
        elif event == "delta":
            delta = response.delta
            self.tokens.setdefault(delta.sequence_index, []).extend(delta.token_ids)
            self.text[delta.sequence_index] = self.text.get(delta.sequence_index, "") + delta.text
            self.logprobs.extend(delta.logprobs)
        elif event == "finished":
            self.finished[response.finished.sequence_index] = response.finished
        else:
            self.usage = response.usage


class Rig:
    """Fakes, a gateway over them, and a client."""

    def __init__(
        self, prefills: list[FakePrefill], decodes: list[FakeDecode], stores: list[FakeStore]
    ) -> None:
        self.prefills, self.decodes, self.stores = prefills, decodes, stores
        self.meters = Meters()
        self.gateway: Any = None
        self.address = self.admin_address = ""
        self.channel: Any = None
        self.generation: Any = None
        self.models: Any = None

    async def start(self, model: Path, **flags: Any) -> None:
        for worker in [*self.prefills, *self.decodes, *self.stores]:
            await worker.start()
        settings = GatewaySettings(
            model=model,
            model_name="fake",
            prefill=tuple(p.address for p in self.prefills),
            decode=tuple(d.address for d in self.decodes),
            kvstore=tuple(s.address for s in self.stores),
            **{"poll_s": 0.05, "drain_s": 0.2, **flags},
        )
        telemetry = self.meters.telemetry
        self.gateway = Gateway(settings, Tokenizer.load(model), telemetry, "test")
        self.address, self.admin_address = await self.gateway.start()
        self.channel = grpc.aio.insecure_channel(self.address)
        self.generation = gateway_pb2_grpc.GenerationServiceStub(self.channel)
        self.models = gateway_pb2_grpc.ModelServiceStub(self.channel)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Waits for the router to see something."""
        while not condition():
            await self.gateway.router.changed()

    async def ready(self) -> None:
        router = self.gateway.router
        await self.until(
            lambda: (
                router.is_ready
                and all(i.is_ready for i in [*router.prefills, *router.decodes])
                and all(s.is_open for s in router._sessions)
            )
        )

    async def generate(self, request: gateway_pb2.GenerateRequest) -> Answer:
        answer = Answer()
        async for response in self.generation.Generate(request, timeout=20):
            answer.add(response)
        return answer

    async def refusal(self, request: gateway_pb2.GenerateRequest) -> grpc.aio.AioRpcError:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await self.generate(request)
        return raised.value

    async def close(self) -> None:
        if self.channel is not None:
            await self.channel.close()
        if self.gateway is not None:
            await self.gateway.close()
        for worker in [*self.prefills, *self.decodes, *self.stores]:
            await worker.kill()


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    write_byte_tokenizer(path)
    return path


MakeRig = Callable[..., Awaitable[Rig]]


@pytest.fixture
async def make_rig(model_dir: Path) -> AsyncIterator[MakeRig]:
    """Starts rigs: `await make_rig(num_prefill=1, num_decode=1, **gateway flags)`."""
    async with contextlib.AsyncExitStack() as stack:

        async def make(
            *, num_prefill: int = 1, num_decode: int = 1, model: Path | None = None, **flags: Any
        ) -> Rig:
            rig = Rig(
                [FakePrefill() for _ in range(num_prefill)],
                [FakeDecode() for _ in range(num_decode)],
                [FakeStore()],
            )
            stack.push_async_callback(rig.close)
            await rig.start(model or model_dir, **flags)
            await rig.ready()
            return rig

        yield make
