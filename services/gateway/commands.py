"""What the workers are told about one request.

Owns the translation from a valid, tokenized request. Never sends.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from protos import common_pb2, decode_pb2, prefill_pb2
from services.gateway.sequence import Sequence
from services.gateway.validation import ValidRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class Commands:
    """Messages of a request whose prompt and length are known."""

    valid: ValidRequest
    prompt_token_ids: list[int]
    max_new_tokens: int

    def prefill(
        self, sequences: Iterable[Sequence], fingerprint: bytes, tail_key: bytes
    ) -> prefill_pb2.PrefillRequest:
        """The call to a prefill instance; tail_key names the tail it is to seal."""
        valid = self.valid
        return prefill_pb2.PrefillRequest(
            request_id=valid.request_id,
            prompt_token_ids=self.prompt_token_ids,
            sequences=[sequence.state() for sequence in sequences],
            sampling=valid.sampling,
            stopping=self._stopping(),
            eos_token_ids=valid.eos_token_ids,
            logprobs=valid.num_logprobs,
            prompt_logprobs=valid.num_prompt_logprobs,
            priority=valid.priority,
            cache_salt=valid.cache_salt,
            fingerprint=fingerprint,
            tail_key=tail_key,
        )

    def prefetch(
        self, handoff: common_pb2.Handoff, fingerprint: bytes, traceparent: str
    ) -> decode_pb2.Prefetch:
        """What lets a rank pull before `admit`."""
        valid = self.valid
        return decode_pb2.Prefetch(
            request_id=valid.request_id,
            prompt_token_ids=self.prompt_token_ids,
            cache_salt=valid.cache_salt,
            handoff=handoff,
            priority=valid.priority,
            fingerprint=fingerprint,
            traceparent=traceparent,
        )

    def admit(
        self,
        sequences: Iterable[Sequence],
        handoff: common_pb2.Handoff | None,
        fingerprint: bytes,
        traceparent: str,
    ) -> decode_pb2.Admit:
        """The admission to a rank of sequences that go on; no hand-off on a resume."""
        valid = self.valid
        return decode_pb2.Admit(
            request_id=valid.request_id,
            prompt_token_ids=self.prompt_token_ids,
            sequences=[sequence.state() for sequence in sequences],
            sampling=valid.sampling,
            stopping=self._stopping(),
            eos_token_ids=valid.eos_token_ids,
            logprobs=valid.num_logprobs,
            priority=valid.priority,
            cache_salt=valid.cache_salt,
            handoff=handoff,
            traceparent=traceparent,
            fingerprint=fingerprint,
        )

    def _stopping(self) -> common_pb2.StoppingParams:
        """As the workers see it: the length is fixed and stop strings stay here."""
        stopping = common_pb2.StoppingParams()
        stopping.CopyFrom(self.valid.stopping)
        stopping.max_new_tokens = self.max_new_tokens
        stopping.ClearField("stop_strings")
        return stopping
