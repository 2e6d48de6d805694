"""How fast blocks come back from lower tiers, against plain copies of the same bytes.

Owns the flags; the measurements are kvstore_tiers_disk.py's and kvstore_tiers_cuda.py's.

    python -m benchmarks.kvstore_tiers --dir /var/tmp --out benchmarks/results/kvstore_tiers.json
    python -m benchmarks.kvstore_tiers --device cuda --out FILE
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from benchmarks import kvstore_tiers_cuda, kvstore_tiers_disk


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description="lower tiers against plain copies")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of the arena")
    parser.add_argument("--dir", type=Path, default=Path("/var/tmp"), help="on the disk to measure")
    parser.add_argument("--out", type=Path, default=None, help="JSON file to write")
    parser.add_argument("--total-mib", type=int, default=1024, help="cpu: bytes of blocks a size")
    parser.add_argument("--num-blocks", type=int, default=256, help="cuda: blocks of 9 MiB")
    parser.add_argument("--repeats", type=int, default=7, help="turns")
    arguments = parser.parse_args()
    if arguments.device == "cuda":
        result = kvstore_tiers_cuda.run(arguments.dir, arguments.num_blocks, arguments.repeats)
    else:
        total = arguments.total_mib << 20
        result = kvstore_tiers_disk.run(arguments.dir, total, arguments.repeats)
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
