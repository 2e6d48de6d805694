"""The `kvmesh` command: parses flags and hands over to one module per subcommand."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from kvmesh import bench, doctor, generate, health, status, top
from kvmesh.client import DEFAULT_ADDR
from kvmesh.options import MeshOptions
from kvmesh.up import run_up

DEMO_MODEL = Path(__file__).resolve().parents[1] / "models" / "demo"
BROKEN_PIPE = 141


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one subcommand and exits with its code."""
    args = _parser().parse_args(argv)
    try:
        sys.exit(args.run(args))
    except KeyboardInterrupt:
        sys.exit(generate.INTERRUPTED)
    except BrokenPipeError:  # the reader (head, less) is gone; keep Python's own flush quiet
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(BROKEN_PIPE)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kvmesh", description="Serves large language models as a mesh of gRPC services."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_up(_command(commands, "up", "start a mesh on this machine", _run_up))
    parsers = [
        (generate.add_arguments, "generate", "stream one answer", generate.run_generate),
        (status.add_arguments, "status", "show the mesh's instances", status.run_status),
        (health.add_arguments, "health", "ask a process if it is ready", health.run_health),
        (top.add_arguments, "top", "show the mesh's decode steps, live", top.run_top),
        (bench.add_arguments, "bench", "put a mesh under load and measure it", bench.run_bench),
    ]
    for add_arguments, name, help_text, run in parsers:
        command = _command(commands, name, help_text, run)
        command.add_argument("--addr", default=DEFAULT_ADDR, help="the gateway, host:port")
        add_arguments(command)
    doctor.add_arguments(
        _command(commands, "doctor", "check this machine and this installation", doctor.run_doctor)
    )
    return parser


def _command(commands: argparse._SubParsersAction, name: str, help_text: str, run: object):
    command = commands.add_parser(
        name,
        help=help_text,
        description=help_text[0].upper() + help_text[1:] + ".",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    command.set_defaults(run=run)
    return command


def _add_up(parser: argparse.ArgumentParser) -> None:
    _add_model(parser.add_argument_group("model"))
    size = parser.add_argument_group("size of the mesh")
    for role in ("prefill", "decode", "kvstore"):
        size.add_argument(f"--{role}", type=int, default=1, metavar="N", help="number of processes")
    size.add_argument(
        "--kv-bytes",
        help="KV memory of each worker; default: 256MiB on cpu, what the weights leave on cuda",
    )
    size.add_argument(
        "--store-bytes", help="KV memory of each kvstore; default: 256MiB on cpu, 4GiB on cuda"
    )
    _add_tiers(size)
    workers = parser.add_argument_group("workers")
    for flag, text in (
        ("--block-tokens", "tokens per block, 8 to 256"),
        ("--max-batch", "most sequences per step, at least 1"),
        ("--chunk-tokens", "most prompt tokens computed per step, at least 16"),
    ):
        workers.add_argument(flag, type=int, metavar="N", help=text + "; default: the service's")
    workers.add_argument(
        "--kv-path",
        choices=("auto", "read", "write"),
        default="auto",
        help="who moves blocks from kvstores to workers: the worker (read) or the store (write)",
    )
    _add_network(parser.add_argument_group("network"))
    process = parser.add_argument_group("process")
    process.add_argument("--log-format", choices=("text", "json"), default="text", help="of logs")
    process.add_argument(
        "--log-level", choices=("debug", "info", "warning", "error"), default="info", help="least"
    )
    process.add_argument("--drain-s", type=float, default=10.0, help="seconds to finish requests")
    process.add_argument("--sample", metavar="TEXT", help="stream one answer to TEXT when ready")
    _add_metrics(process)


def _add_network(network: argparse._ArgumentGroup) -> None:
    network.add_argument("--host", default="127.0.0.1", help="where the gateway listens")
    network.add_argument("--port", type=int, default=50051, help="public port; 0 picks a free one")
    network.add_argument(
        "--admin-port", type=int, help="status port; 0 picks a free one; default: port + 1"
    )
    network.add_argument(
        "--http-port", type=int, help="live page's port; 0 picks a free one; default: port + 2"
    )


def _add_metrics(process: argparse._ArgumentGroup) -> None:
    process.add_argument(
        "--metrics-port",
        type=int,
        help="Prometheus' /metrics of the gateway; kvstores, prefills and decodes behind it",
    )


def _add_model(model: argparse._ArgumentGroup) -> None:
    model.add_argument(
        "--model", type=Path, default=DEMO_MODEL, help="directory in Hugging Face layout"
    )
    model.add_argument("--model-name", default="", help="public name; default: the directory's")
    model.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="of workers and kvstores; cuda: all of them share the first GPU",
    )
    model.add_argument(
        "--dtype",
        choices=("auto", "fp32", "bf16", "fp8"),
        default="auto",
        help="of weights; auto is the checkpoint's FP8, else fp32 on cpu, bf16 on cuda",
    )
    model.add_argument(
        "--kv-dtype",
        choices=("auto", "bf16", "fp8"),
        default="auto",
        help="of KV; auto is the dtype of activations",
    )
    model.add_argument(
        "--load-format",
        choices=("auto", "dummy"),
        default="auto",
        help="where weights come from; auto reads *.safetensors, dummy makes random ones",
    )


def _add_tiers(size: argparse._ArgumentGroup) -> None:
    """Where kvstores keep what their memory has no room for."""
    size.add_argument(
        "--store-host",
        metavar="SIZE",
        help="with --device cuda: pinned host memory of each kvstore, for blocks beyond that",
    )
    size.add_argument(
        "--store-disk", type=Path, metavar="DIR", help="where kvstores keep blocks beyond memory"
    )
    size.add_argument("--store-disk-bytes", default="1GiB", help="most bytes of each in DIR")


def mesh_options(args: argparse.Namespace) -> MeshOptions:
    """The options of `kvmesh up` out of its parsed flags."""
    return MeshOptions(
        model=args.model.expanduser().resolve(),
        model_name=args.model_name,
        num_prefill=args.prefill,
        num_decode=args.decode,
        num_kvstore=args.kvstore,
        host=args.host,
        port=args.port,
        admin_port=args.admin_port,
        http_port=args.http_port,
        device=args.device,
        dtype=args.dtype,
        kv_dtype=args.kv_dtype,
        load_format=args.load_format,
        kv_path=args.kv_path,
        kv_bytes=args.kv_bytes,
        store_bytes=args.store_bytes,
        store_host=args.store_host,
        store_disk=args.store_disk and args.store_disk.expanduser().resolve(),
        store_disk_bytes=args.store_disk_bytes,
        block_tokens=args.block_tokens,
        max_batch=args.max_batch,
        chunk_tokens=args.chunk_tokens,
        log_format=args.log_format,
        log_level=args.log_level,
        drain_s=args.drain_s,
        metrics_port=args.metrics_port,
    )


def _run_up(args: argparse.Namespace) -> int:
    return run_up(mesh_options(args), args.sample)
