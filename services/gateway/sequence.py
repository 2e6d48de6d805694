"""One sequence of a request as its client sees it.

Owns the tokens received so far, their text, stop-string matching and the delta not yet sent. Never
waits: it is fed by the session's dispatch and drained by the client's stream.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as List

from protos import common_pb2, gateway_pb2
from services.gateway.detokenizer import Detokenizer
from services.gateway.logprob_text import fill_texts
from services.gateway.stop_strings import StopStrings

_TOKEN_REASONS = (common_pb2.FINISH_REASON_STOP_TOKEN, common_pb2.FINISH_REASON_EOS)


class Sequence:
    """Tokens in, deltas out."""

    def __init__(
        self,
        *,
        index: int,
        seed: int,
        detokenizer: Detokenizer,
        stop_strings: StopStrings,
        min_new_tokens: int,
        token_text: Callable[[int], str],
    ) -> None:
        self.index = index
        self.seed = seed
        self.output_token_ids: list[int] = []
        self.finished: gateway_pb2.Finished | None = None
        self._detokenizer = detokenizer
        self._stop_strings = stop_strings
        self._min_new_tokens = min_new_tokens
        self._token_text = token_text
        self._num_sent = 0
        self._text: list[str] = []
        self._logprobs: list[common_pb2.PositionLogprobs] = []
        self._is_finish_sent = False

    def echo(self, prompt_token_ids: List[int]) -> gateway_pb2.GenerateResponse:
        """The prompt as this sequence's first delta; its text is never searched for stops."""
        text = self._detokenizer.push(prompt_token_ids)
        delta = gateway_pb2.Delta(sequence_index=self.index, token_ids=prompt_token_ids, text=text)
        return gateway_pb2.GenerateResponse(delta=delta)

    def push(
        self,
        token_ids: List[int],
        logprobs: List[common_pb2.PositionLogprobs],
        reason: common_pb2.FinishReason,
    ) -> None:
        """Takes new tokens; what comes after the sequence's end is dropped."""
        if self.finished is not None:
            return
        for position, token_id in enumerate(token_ids):
            self.output_token_ids.append(token_id)
            if logprobs:
                self._logprobs.append(logprobs[position])
            if self._show(self._detokenizer.push((token_id,))):
                return
        if reason != common_pb2.FINISH_REASON_UNSPECIFIED:
            self.finish(reason)

    def finish(self, reason: common_pb2.FinishReason) -> None:
        """Ends the sequence and releases the text held back."""
        if self.finished is not None or self._show(self._detokenizer.flush()):
            return
        self._text.append(self._stop_strings.flush())
        finished = gateway_pb2.Finished(sequence_index=self.index, reason=reason)
        if reason in _TOKEN_REASONS and self.output_token_ids:
            finished.stop_token_id = self.output_token_ids[-1]
        self.finished = finished

    def take(self) -> list[gateway_pb2.GenerateResponse]:
        """All that is new since the last call: at most one delta, and the finish."""
        messages = []
        token_ids = self.output_token_ids[self._num_sent :]
        text = "".join(self._text)
        if token_ids or text:
            delta = gateway_pb2.Delta(
                sequence_index=self.index, token_ids=token_ids, text=text, logprobs=self._logprobs
            )
            fill_texts(delta.logprobs, self._token_text)
            messages.append(gateway_pb2.GenerateResponse(delta=delta))
            self._num_sent += len(token_ids)
            self._text.clear()
            self._logprobs.clear()
        if self.finished is not None and not self._is_finish_sent:
            self._is_finish_sent = True
            messages.append(gateway_pb2.GenerateResponse(finished=self.finished))
        return messages

    def state(self) -> common_pb2.SequenceState:
        """What a decode rank needs to go on from here."""
        return common_pb2.SequenceState(
            sequence_index=self.index, output_token_ids=self.output_token_ids, seed=self.seed
        )

    def _show(self, text: str) -> bool:
        """Passes text on; True when a stop string ended the sequence in it."""
        if not text:
            return False
        is_enabled = len(self.output_token_ids) > self._min_new_tokens
        shown, stop = self._stop_strings.push(text, enabled=is_enabled)
        if shown:
            self._text.append(shown)
        if stop is None:
            return False
        self.finished = gateway_pb2.Finished(
            sequence_index=self.index, reason=common_pb2.FINISH_REASON_STOP_STRING, stop_string=stop
        )
        return True
