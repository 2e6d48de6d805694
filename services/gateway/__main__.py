"""`python -m services.gateway`: parses flags and runs the gateway until it is told to stop."""

from __future__ import annotations

import asyncio
import logging

from mesh.logs import setup_logging
from mesh.process import new_incarnation, run_service
from mesh.settings import parse_settings
from mesh.telemetry import Telemetry
from services.gateway.process import Gateway
from services.gateway.settings import GatewaySettings
from services.gateway.tokenizer import Tokenizer

log = logging.getLogger("kvmesh.gateway")


def main() -> None:
    """The gateway's process."""
    settings = parse_settings(GatewaySettings, "python -m services.gateway")
    setup_logging(settings.log_format, settings.log_level, "gateway")

    async def serve(stop: asyncio.Event) -> None:
        incarnation = new_incarnation()
        telemetry = Telemetry.start(
            role="gateway",
            incarnation=incarnation,
            settings=settings,
        )
        tokenizer = await asyncio.to_thread(Tokenizer.load, settings.model)
        log.info("tokenizer of %s loaded", settings.model.name)
        try:
            await Gateway(settings, tokenizer, telemetry, incarnation).serve(stop)
        finally:
            telemetry.close()

    run_service(serve, die_with_parent=settings.die_with_parent)


if __name__ == "__main__":
    main()
