"""No prompt, generated text or secret is in anything that a mesh says about itself."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable

import pytest

from tests.e2e.telemetry.conftest import LoudRun
from tests.support.canaries import NUM_IDS, Canaries


@pytest.mark.timeout(600)  # the whole load
def test_no_secret_is_in_any_signal(loud_run: LoudRun) -> None:
    assert loud_run.canaries.find(loud_run.mesh.evidence()) == []


@pytest.mark.timeout(600)
def test_every_signal_was_there_to_be_searched(loud_run: LoudRun) -> None:
    """What a request leaves behind on purpose is found in each: the search looks at the right."""
    evidence = loud_run.mesh.evidence()
    for place, told in (
        ("OTLP", "publish"),
        ("OTLP", "kvmesh.decode.step.tokens"),
        ("/metrics", "kvmesh_decode_step_tokens_bucket"),
        ("status", "decode_steps"),
        ("live page", "tokens_per_s"),
    ):
        assert told in evidence[place], place
    logs = "".join(text for place, text in evidence.items() if place.startswith("log of"))
    for told in ('"message": "incident ', "Traceback", '"level": "debug"', '"name": "publish"'):
        assert told in logs, told


@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", ["prompt", "chat", "stop string", "metadata", "tenant", "output"])
def test_a_planted_secret_is_found_in_each_signal(loud_run: LoudRun, kind: str) -> None:
    """Each kind of the load's own secrets, put where it must never be."""
    secret = loud_run.canaries.example(kind)
    for place, text in loud_run.mesh.evidence().items():
        middle = len(text) // 2
        planted = {place: f"{text[middle:][:5000]} {secret} {text[:middle][-5000:]}"}
        assert [line.startswith(f"{kind} in") for line in loud_run.canaries.find(planted)] == [True]


@pytest.mark.parametrize(
    "hide",
    [
        lambda text: text,
        lambda text: text.upper(),
        lambda text: json.dumps({"a": text}),
        lambda text: text.encode().hex(),
        lambda text: repr(text.encode()),
        *(
            lambda text, n=n: base64.b64encode(b"x" * n + text.encode() + b"yy").decode()
            for n in range(4)
        ),
        lambda text: base64.urlsafe_b64encode(b"??" + text.encode()).decode(),
    ],
)
def test_a_text_is_found_in_every_form(hide: Callable[[str], str]) -> None:
    canaries = Canaries()
    canaries.add("prompt", "zq~Canary>>?of 1")
    assert canaries.find({"here": f"before {hide('zq~Canary>>?of 1')} behind"})
    assert not canaries.find({"here": hide("zq~Another>>?of 2")})


@pytest.mark.parametrize("form", ["{}", "ids: {}\n", "{}\n", "'{}', "])
def test_token_ids_are_found_in_every_form(form: str) -> None:
    canaries, ids = Canaries(), [7, 201, 45, 0, 93, 120, 5, 61]
    canaries.add_ids("prompt", ids)
    separator = ", " if form == "{}" else ""
    text = separator.join(form.format(one) for one in ids)
    assert canaries.find({"here": f"1 2 {text} 3"})
    part = separator.join(form.format(one) for one in ids[: NUM_IDS - 1])
    assert not canaries.find({"here": f"1 2 {part} 3"})
