"""Stop strings in text that comes in pieces: nothing of a match leaks, nothing else is lost."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from services.gateway.stop_strings import StopStrings

LETTERS = "ab"


def first_match(text: str, stops: list[str], min_end: int) -> tuple[int, str] | None:
    """The plain rule: the occurrence that ends first beyond min_end, the longest of those."""
    for end in range(min_end + 1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return end, max(found, key=len)
    return None


@given(
    pieces=st.lists(st.text(LETTERS, max_size=4), max_size=12),
    stops=st.lists(st.text(LETTERS, min_size=1, max_size=4), max_size=3),
    include=st.booleans(),
    num_passed=st.integers(0, 6),
)
@settings(max_examples=800, deadline=None)
def test_the_outcome_is_that_of_the_whole_text(
    pieces: list[str], stops: list[str], include: bool, num_passed: int
) -> None:
    text = "".join(pieces)
    expected = first_match(text, stops, len("".join(pieces[:num_passed])))
    matcher = StopStrings(stops, include=include)
    shown, matched = "", None
    for index, piece in enumerate(pieces):
        part, matched = matcher.push(piece, enabled=index >= num_passed)
        shown += part
        if matched is not None:
            break
        assert text.startswith(shown)
    if expected is None:
        assert matched is None and shown + matcher.flush() == text
    else:
        end, stop = expected
        assert matched == stop
        start = end if include else end - len(stop)
        assert shown == text[:start]


def test_only_what_may_begin_a_stop_is_held_back() -> None:
    matcher = StopStrings(["</end>"], include=False)
    assert matcher.push("text <", enabled=True) == ("text ", None)
    assert matcher.push("/e", enabled=True) == ("", None)
    assert matcher.push("x", enabled=True) == ("</ex", None)
    assert matcher.push("</end> more", enabled=True) == ("", "</end>")


def test_without_stop_strings_text_passes_at_once() -> None:
    matcher = StopStrings([], include=False)
    assert matcher.push("abc", enabled=True) == ("abc", None) and matcher.flush() == ""


def test_the_cut_into_pieces_does_not_matter() -> None:
    text, stops = "xxabcx", ["abc", "b"]
    outcomes = set()
    for size in range(1, len(text) + 1):
        matcher = StopStrings(stops, include=False)
        shown, stop = "", None
        for piece in _cut(text, size):
            part, stop = matcher.push(piece, enabled=True)
            shown += part
            if stop:
                break
        outcomes.add((shown, stop))
    assert outcomes == {("xxa", "b")}


def _cut(text: str, size: int) -> list[str]:
    return [text[i : i + size] for i in range(0, len(text), size)]
