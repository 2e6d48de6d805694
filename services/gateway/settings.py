"""The gateway's flags. Owns names, defaults and limits; never reads anything itself."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mesh.channel import MAX_MESSAGE_BYTES
from mesh.discovery import SOURCES_HELP, parse_sources
from mesh.service_settings import ServiceSettings
from mesh.settings import parse_bytes, setting


@dataclass(frozen=True, kw_only=True)
class GatewaySettings(ServiceSettings):
    """Flags of `python -m services.gateway`."""

    model: Path = setting(
        Path("models/demo"), group="model", help="directory with tokenizer.json and config.json"
    )
    model_name: str = setting("", group="model", help="public name; default: the directory's name")
    prefill: tuple[str, ...] = setting((), group="mesh", help="prefill addresses, host:port,...")
    decode: tuple[str, ...] = setting((), group="mesh", help="decode addresses, host:port,...")
    kvstore: tuple[str, ...] = setting((), group="mesh", help=SOURCES_HELP, parse=parse_sources)
    admin_port: int = setting(
        0, group="mesh", help="port of StatusService; 0 is any", minimum=0, maximum=65535
    )
    http_port: int | None = setting(
        None, group="live page", help="port of the live page; 0 picks one", minimum=0, maximum=65535
    )
    http_hosts: tuple[str, ...] = setting(
        (),
        group="live page",
        help="names by which browsers reach it, beside addresses, localhost and this host's name",
    )
    poll_s: float = setting(
        0.5, group="mesh", help="seconds between two status polls", minimum=0.05, maximum=60.0
    )
    lost_after_s: float = setting(
        2.0,
        group="mesh",
        help="seconds of silence until an instance is lost and its requests go elsewhere",
        minimum=0.2,
        maximum=600.0,
    )
    max_live_requests: int = setting(
        1024, group="admission", help="requests in flight; more are refused", minimum=1
    )
    max_request_bytes: int = setting(
        4 * 2**20,
        group="admission",
        help="longest public message; longer ones end with RESOURCE_EXHAUSTED",
        parse=parse_bytes,
        minimum=2**16,
        maximum=MAX_MESSAGE_BYTES,
    )
    max_attempts: int = setting(
        3, group="admission", help="tries per phase of a request", minimum=1, maximum=10
    )
    rank_wait_s: float = setting(
        10.0, group="admission", help="longest wait for an instance", minimum=0.0, maximum=600.0
    )
