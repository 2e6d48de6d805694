"""The rows of the house import downwards only; small images stay small."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys

import pytest

from tests.rules.tree import ROOT, project_files

HEAVY = ("torch", "triton", "safetensors", "engine", "kernels")


def test_import_contracts_hold() -> None:
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as c; c()"]
    done = subprocess.run(
        [*command, "--config", "pyproject.toml", "--no-cache"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("service", ["gateway", "kvstore"])
def test_a_small_service_loads_no_tensors(service: str) -> None:
    """transformers would import torch if it could: these services run where it is not installed."""
    program = f"""
import importlib.util
import sys
find_spec = importlib.util.find_spec
def find_light_spec(name, package=None):
    return None if name.partition(".")[0] in {HEAVY!r} else find_spec(name, package)
importlib.util.find_spec = find_light_spec
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {HEAVY!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
sys.argv = ["service", "--help"]
import runpy
runpy.run_module("services.{service}", run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--port" in done.stdout


def test_the_client_needs_only_grpc() -> None:
    """`from kvmesh import Client` works where no service's extra is installed."""
    heavy = (*HEAVY, "numpy", "transformers", "opentelemetry", "nixl_cu13")
    program = f"""
import sys
import kvmesh
loaded = sorted(set({heavy!r}) & set(sys.modules))
assert not loaded, loaded
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_kernels_stays_empty_and_alone() -> None:
    """transformers imports a distribution named kernels; ours must not look like it."""
    assert (ROOT / "kernels" / "__init__.py").read_text() == ""
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("kernels")


def test_transformers_models_import_with_our_kernels_on_the_path() -> None:
    program = "import kernels; from transformers import LlamaForCausalLM, Qwen3ForCausalLM"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_no_package_under_tests_shadows_a_real_one() -> None:
    found = [p for p in project_files() if p.parts[0] == "tests" and p.name == "__init__.py"]
    assert not found
