"""The commands that talk to a mesh, against a scripted gateway."""

from __future__ import annotations

import dataclasses
import io
import json

import pytest

from kvmesh import bench, cli, status
from kvmesh.options import MeshOptions
from services.worker_settings import WorkerSettings
from tests.kvmesh.fake_gateway import GREETING, FakeGateway


def run(*argv: str) -> int:
    """Runs the command; returns its exit code."""
    with pytest.raises(SystemExit) as caught:
        cli.main(argv)
    assert isinstance(caught.value.code, int)
    return caught.value.code


def test_generate_prints_the_text_and_its_figures(
    gateway: FakeGateway, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("generate", GREETING, "--addr", gateway.address, "--seed", "4") == 0
    printed = capsys.readouterr()
    assert printed.out == f"{GREETING}\n"
    assert "2 tokens" in printed.err
    assert "seed 4" in printed.err


def test_generate_json_is_one_object_a_line(
    gateway: FakeGateway, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("generate", GREETING, "--addr", gateway.address, "--json", "--logprobs", "1") == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["event"] for line in lines] == ["delta", "delta", "result"]
    assert lines[0]["logprobs"][0]["chosen"]["rank"] == 1
    assert lines[-1]["sequences"][0]["text"] == GREETING
    assert lines[-1]["usage"]["num_output_tokens"] == 2


def test_generate_passes_flags_on_and_leaves_the_rest_unset(
    gateway: FakeGateway, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--max-new-tokens", "5", "--temperature", "0", "--stop", "x", "--logprobs", "0")
    assert run("generate", "a b", "--addr", gateway.address, *flags) == 0
    request = gateway.requests[0]
    assert request.stopping.max_new_tokens == 5
    assert request.sampling.HasField("temperature")
    assert not request.sampling.HasField("seed")
    assert list(request.stopping.stop_strings) == ["x"]
    assert "logprob" in capsys.readouterr().out


def test_generate_chat_reads_standard_input(
    gateway: FakeGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("who?"))
    assert run("generate", "-", "--chat", "--addr", gateway.address) == 0
    message = gateway.requests[0].chat.messages[0]
    assert (message.role, message.content) == ("user", "who?")


def test_generate_names_the_refused_field(
    gateway: FakeGateway, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("generate", "fail:temperature", "--addr", gateway.address) == 1
    assert "sampling.temperature" in capsys.readouterr().err


@pytest.mark.parametrize("timeout_s", ["-1", "nan", "0"])
def test_generate_refuses_a_timeout_that_is_no_deadline(
    gateway: FakeGateway, capsys: pytest.CaptureFixture[str], timeout_s: str
) -> None:
    assert run("generate", "x", "--addr", gateway.address, "--timeout-s", timeout_s) == 2
    assert f"--timeout-s {float(timeout_s)}: give above 0 and" in capsys.readouterr().err
    assert not gateway.requests


def test_generate_names_the_limit_of_a_number(
    gateway: FakeGateway, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("generate", "x", "--addr", gateway.address, "--seed", "-1") == 1
    assert "sampling.seed: -1; must be 0 to 18446744073709551615" in capsys.readouterr().err


def test_generate_without_a_mesh_says_how_to_start_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("generate", "x", "--addr", "127.0.0.1:1") == 1
    assert "kvmesh up" in capsys.readouterr().err


def test_status_shows_every_instance_and_fails_when_one_is_not_ready(
    gateway: FakeGateway, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("status", "--admin-addr", gateway.address) == 1
    out = capsys.readouterr().out
    assert "3/40" in out
    assert "12.5" in out
    assert "decode 0: loading weights" in out
    assert "Qwen3ForCausalLM" in out


def test_status_json_carries_every_field(
    gateway: FakeGateway, capsys: pytest.CaptureFixture[str]
) -> None:
    run("status", "--admin-addr", gateway.address, "--json")
    instances = json.loads(capsys.readouterr().out)
    assert instances[1]["counts"]["num_blocks"] == 40


def test_status_asks_the_port_after_the_public_one() -> None:
    assert status.admin_address("127.0.0.1:50051") == "127.0.0.1:50052"


def test_bench_counts_what_it_received(
    gateway: FakeGateway, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--requests", "5", "--concurrency", "2", "--prompt-tokens", "4", "--json")
    assert run("bench", "--addr", gateway.address, *flags) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["num_requests"], report["num_output_tokens"]) == (5, 10)
    assert len(gateway.requests) == 6
    assert all(len(request.token_ids.ids) == 4 for request in gateway.requests)


def test_bench_shares_a_prefix_when_asked(gateway: FakeGateway) -> None:
    flags = ("--requests", "3", "--prompt-tokens", "8", "--shared-prefix", "6")
    assert run("bench", "--addr", gateway.address, *flags) == 0
    prompts = [tuple(request.token_ids.ids) for request in gateway.requests]
    assert len({prompt[:6] for prompt in prompts}) == 1
    assert len(set(prompts)) > 1


def test_quantiles_are_nearest_rank() -> None:
    values = [float(value) for value in range(100)]
    assert bench.quantile(values, 0.5) == 50.0
    assert bench.quantile(values, 0.99) == 99.0
    assert bench.quantile([], 0.5) == 0.0


@pytest.mark.parametrize("command", ["up", "generate", "status", "top", "doctor", "bench"])
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(command, "--help") == 0
    assert "usage: kvmesh" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["dtype", "kv_dtype", "load_format", "kv_path"])
def test_up_offers_the_choices_of_the_workers(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    fields = {field.name: field.metadata for field in dataclasses.fields(WorkerSettings)}
    assert run("up", "--help") == 0
    flag = "--" + name.replace("_", "-")
    assert f"{flag} {{{','.join(fields[name]['choices'])}}}" in capsys.readouterr().out


def test_up_hands_the_load_format_on(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[MeshOptions] = []
    monkeypatch.setattr(cli, "run_up", lambda options, sample: seen.append(options) or 0)
    assert run("up", "--load-format", "dummy") == 0 and run("up") == 0
    assert [options.load_format for options in seen] == ["dummy", "auto"]


@pytest.mark.parametrize("flag", ["--requests", "--concurrency", "--prompt-tokens"])
def test_bench_refuses_a_load_of_nothing(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("bench", flag, "0") == 2
    error = capsys.readouterr().err
    assert f"argument {flag}: 0; give at least 1" in error
