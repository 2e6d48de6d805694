"""A mesh on random weights: answers as any other, and needs no file of weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from protos import gateway_pb2
from tests.support.generate import generate
from tests.support.mesh import ROOT, running_mesh

DEMO = ROOT / "models" / "demo"
NUM_TOKENS = 24


def test_config_and_tokenizer_are_enough_for_answers_that_repeat(tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, tmp_path)
    config = json.loads((DEMO / "config.json").read_text())
    # A random embedding that is also the head finds its own token likeliest, for ever.
    config["tie_word_embeddings"] = False
    (tmp_path / "config.json").write_text(json.dumps(config))
    request = gateway_pb2.GenerateRequest(text="It was a dark and stormy night. " * 20)
    request.sampling.seed = 3
    request.stopping.max_new_tokens = NUM_TOKENS
    request.stopping.ignore_eos = True
    flags = ("--load-format", "dummy")
    with running_mesh(tmp_path, worker_flags=flags, env={"RMSNORM_WARPS": "8"}) as mesh:
        first, again = generate(mesh, request), generate(mesh, request)
        workers = (*mesh.prefills, *mesh.decodes)
        prints = {mesh.status(worker.address).model.fingerprint for worker in workers}
    assert len(prints) == 1
    assert len(first.tokens[0]) == NUM_TOKENS and len(set(first.tokens[0])) > 1
    assert first.tokens == again.tokens and first.text == again.text
    assert first.usage is not None and first.usage.num_cached_tokens == 0
    assert again.usage is not None and again.usage.num_cached_tokens > 0
