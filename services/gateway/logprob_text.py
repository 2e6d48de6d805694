"""Token texts of log probabilities.

Owns filling in what workers, which have no tokenizer, leave out; never changes a number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from protos import common_pb2


def fill_texts(
    positions: Iterable[common_pb2.PositionLogprobs], token_text: Callable[[int], str]
) -> None:
    """Sets `text` of every chosen and alternative token, in place."""
    for position in positions:
        position.chosen.text = token_text(position.chosen.token_id)
        for token in position.top:
            token.text = token_text(token.token_id)
