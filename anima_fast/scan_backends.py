"""The backends of the recurrent ops: the same four, with the same constraints, for each."""

from __future__ import annotations

import torch

from . import dispatch

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def scan_backends(op: str) -> tuple[dispatch.Backend, ...]:
    """The backends of `op` in order of preference; facts are {"device": its type, "dtype": ...}."""
    floats = dispatch.one_of("dtype", *_FLOATS)
    return (
        dispatch.Backend(
            "cpu", f"anima_fast.ops.cpu.{op}:{op}", (dispatch.one_of("device", "cpu"), floats), _cpu_unavailable
        ),
        dispatch.Backend(
            "cuda", f"anima_fast.ops.cuda.{op}:{op}", (dispatch.one_of("device", "cuda"), floats), _cuda_unavailable
        ),
        dispatch.Backend("torch", f"anima_fast.ops.torch.{op}:{op}", (floats,)),
        dispatch.Backend(
            "reference",
            f"anima_fast.reference.{op}:{op}",
            (dispatch.one_of("dtype", *_FLOATS, torch.float64),),
        ),
    )


def facts_of(first: torch.Tensor) -> dispatch.Facts:
    return {"device": first.device.type, "dtype": first.dtype}


def _cpu_unavailable() -> str | None:
    from .ops.extension import extension, unavailable

    reason = unavailable()
    if reason is None and not hasattr(extension(), "SsdChunkScan"):
        return "the C++ extension was built without the recurrent ops; rebuild it"
    return reason


def _cuda_unavailable() -> str | None:
    from .ops.cuda import unavailable

    return unavailable()
