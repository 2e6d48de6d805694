"""Writes the boards' JSON beside this file: `make dashboards`."""

from __future__ import annotations

from pathlib import Path

from dashboards import decode_steps, kv_fabric, overview
from dashboards.grafana import to_json

FOLDER = Path(__file__).resolve().parent
BOARDS = (decode_steps.BOARD, overview.BOARD, kv_fabric.BOARD)


def main() -> None:
    """Replaces every board's file."""
    for board in BOARDS:
        (FOLDER / f"{board.uid}.json").write_text(to_json(board))


if __name__ == "__main__":
    main()
