"""What every test runs under: one CPU thread per process, no model hub, no telemetry endpoint."""

from __future__ import annotations

import os

import torch

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.pop("OTEL_EXPORTER_OTLP_ENDPOINT", None)
# Triton decides when a kernel's module is imported; the kernels themselves never read it.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
