"""Registers, spills, shared memory, tensor cores, inner loops and cold starts of the Triton kernels, without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton has no build for this platform, so there is nothing to compile")

SCRIPT = Path(__file__).with_name("triton_budget.py")


def run(script, *arguments):
    # A process of its own: in this one Triton may be an interpreter, and stays what it was at import.
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, str(script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr[-4000:]}"


def test_table_is_of_this_kernel_and_holds_for_the_largest():
    run(SCRIPT, "--quick")


def test_nothing_is_compiled_after_warmup():
    run(SCRIPT.with_name("triton_warmup.py"))


@pytest.mark.slow
def test_every_configuration():
    run(SCRIPT)


def test_the_required_configurations_are_in_the_table():
    rows = json.loads(SCRIPT.with_suffix(".json").read_text())["rows"]
    for arch in (80, 86, 89, 90, 100, 120):
        for D in (64, 128, 256):
            for dtype in ("fp16", "bf16"):
                for kind in (f"logit {dtype} D{D} bias+order+lse", f"blend {dtype} D{D} bias+order"):
                    row = rows[f"sm_{arch} {kind}"]
                    assert row["spill"] == 0 and row["mma"] and row["inner"] <= 1.08 * row["unbiased"]
