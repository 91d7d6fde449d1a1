"""Ops in C++ (csrc/cpu), through `anima_fast._C`."""

from __future__ import annotations

from typing import Any

import torch


def run(call: Any, isa: str, step: bool = False) -> None:
    """Run one of `ops.calls` on torch's number of threads; `step`: a GatedDeltaRule token by token."""
    threads = torch.get_num_threads()
    size = call.cpu_step_workspace(threads) if step else call.cpu_workspace(threads)
    workspace = torch.empty(size + 64, dtype=torch.uint8) if size else None
    aligned = 0 if workspace is None else -(-workspace.data_ptr() // 64) * 64
    (call.cpu_step if step else call.cpu)(aligned, threads, isa)
