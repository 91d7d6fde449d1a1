"""The command-line flags that choose ComfyUI's attention: each in a process of its own, where it is read at import."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sampling import assert_close

BACKENDS = {
    "--use-pytorch-cross-attention": "attention_pytorch",
    "--use-split-cross-attention": "attention_split",
    "--use-quad-cross-attention": "attention_sub_quad",
}


@pytest.fixture(scope="module")
def pictures(comfy, tmp_path_factory):
    folder, here = tmp_path_factory.mktemp("flags"), Path(__file__).parent
    path = os.pathsep.join([str(here.parents[1]), os.environ.get("PYTHONPATH", "")])
    found = {}
    for flag in BACKENDS:
        command = [sys.executable, here / "flagged_run.py", os.environ["ANIMA_FAST_COMFYUI"], folder / flag, flag]
        done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found[flag] = torch.load(folder / flag)
    return found


@pytest.mark.parametrize("flag", BACKENDS)
def test_the_same_pictures_under_every_flag(pictures, flag):
    first = pictures["--use-pytorch-cross-attention"]
    assert pictures[flag]["backend"] == BACKENDS[flag], "the flag took effect"
    for name in ("regions", "accelerate"):
        assert_close(pictures[flag][name], first[name])
    assert_close(pictures[flag]["accelerate"], pictures[flag]["stock"])
    assert (first["regions"] - first["stock"]).abs().max() > 0.05 * first["stock"].abs().max()
