"""Registers, spills and shared memory of the CUDA kernels for every architecture, without a GPU."""

import json
import subprocess
import sys
from pathlib import Path

import cuda_budget
import pytest

SCRIPT = Path(__file__).with_name("cuda_budget.py")

needs_nvcc = pytest.mark.skipif(cuda_budget.find_nvcc() is None, reason="needs nvcc (the CUDA toolkit; no GPU)")


def run(*arguments):
    command = [sys.executable, str(SCRIPT), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr[-8000:]}"


@needs_nvcc
def test_table_is_of_these_sources_and_holds_for_two_architectures():
    run("--quick")


@needs_nvcc
@pytest.mark.slow
def test_every_architecture():
    run()


def test_every_kernel_is_in_the_table_without_spills():
    rows = json.loads(cuda_budget.TABLE.read_text())["rows"]
    assert {key.split()[0] for key in rows} == {f"sm_{arch}" for arch in cuda_budget.ARCHS}
    assert not [key for key, row in rows.items() if cuda_budget.broken_rules(row)]
    kernels = {arch: {key.partition(" ")[2] for key in rows if key.startswith(f"sm_{arch} ")} for arch in (75, 80, 120)}
    assert kernels[80] == kernels[120]
    assert kernels[75] == {kernel for kernel in kernels[80] if "bfloat16" not in kernel}
