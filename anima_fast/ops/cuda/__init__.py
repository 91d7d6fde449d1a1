"""Ops in CUDA (csrc/cuda), through `anima_fast._C`."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch

from ..extension import build_info, extension
from ..extension import unavailable as extension_unavailable

__all__ = ["extension", "stream", "unavailable"]


@functools.cache
def unavailable() -> str | None:
    """Why no CUDA kernel of the extension can run here, or None."""
    reason = extension_unavailable()
    if reason:
        return reason
    built = build_info().get("cuda")
    built = built if isinstance(built, dict) else {}
    if not hasattr(getattr(extension(), "SsdChunkScan", None), "cuda"):
        return (
            f"the extension was built without CUDA ({built.get('reason') or 'nobody recorded why'}); "
            "install a CUDA toolkit with nvcc and reinstall anima-fast"
        )
    if not torch.cuda.is_available():
        return "no CUDA device" if torch.version.cuda else "this torch is built without CUDA"
    devices = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
    if not any(_serves(built.get("archs") or [], 10 * major + minor) for major, minor in devices):
        return (
            f"the extension's CUDA kernels are for {', '.join(built.get('archs') or [])}, not for "
            f"{', '.join(f'sm_{major}{minor}' for major, minor in devices)}; "
            "reinstall anima-fast with ANIMA_FAST_CUDA_ARCHS naming it"
        )
    return None


def _serves(archs: list[str], capability: int) -> bool:
    """Machine code ("sm_80") runs on later minor versions, PTX ("compute_120") on everything later."""
    for arch in archs:
        kind, _, number = arch.partition("_")
        same_major = int(number) // 10 == capability // 10
        if int(number) <= capability and (kind == "compute" or same_major):
            return True
    return False


@contextlib.contextmanager
def stream(device: torch.device) -> Iterator[int]:
    """Makes `device` the current one and gives its stream, as the address the extension takes."""
    with torch.cuda.device(device):
        yield torch.cuda.current_stream(device).cuda_stream


def run(call: Any, device: torch.device, step: bool = False) -> None:
    """Run one of `ops.calls` on the device's current stream; `step`: a GatedDeltaRule token by token."""
    with stream(device) as current:
        size = call.cuda_step_workspace() if step else call.cuda_workspace()
        workspace = torch.empty(size, dtype=torch.uint8, device=device)
        (call.cuda_step if step else call.cuda)(workspace.data_ptr(), current)
