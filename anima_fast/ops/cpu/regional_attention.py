"""Regional attention in C++: csrc/cpu/regional_attention_kernel.h says how."""

from __future__ import annotations

import functools
from typing import Any

import torch

from ...bound_plan import PlanTensors
from ..extension import extension

_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def regional_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    plan: PlanTensors,
    *,
    scale: float,
    combine: str,
    mask: None = None,
    isa: str = "",
) -> None:
    """Write attention of every row under its plan to `out`, and the log of its denominator to `lse`.

    `isa` runs one instruction set ("portable", "avx2", "avx512") instead of this machine's best.
    """
    threads = torch.get_num_threads()
    call, size = _call(q, k.shape[1], plan, scale, combine, threads)
    workspace = torch.empty(size, dtype=torch.uint8)
    aligned = -(-workspace.data_ptr() // 64) * 64
    call.run(
        *(_address(x) for x in (q, k, v, out)),
        lse=0 if lse is None else lse.data_ptr(),
        bias=plan.bias.data_ptr() if plan.bias.shape[2] else 0,
        order=plan.order.data_ptr() if plan.order.shape[1] else 0,
        workspace=aligned,
        threads=threads,
        isa=isa,
    )


def workspace_bytes(q: torch.Tensor, plan: PlanTensors, *, combine: str) -> int:
    """Bytes of temporaries of a call: packed keys and values and a few tiles for each thread."""
    return _call(q, q.shape[1], plan, 1.0, combine, torch.get_num_threads())[1]


def _call(
    q: torch.Tensor, kv_heads: int, plan: PlanTensors, scale: float, combine: str, threads: int
) -> tuple[Any, int]:
    batch, heads, queries, head_dim = q.shape
    sizes = batch, heads, kv_heads, queries, head_dim
    numbers = plan.segments_host, plan.plan_index_host, plan.segments.shape[1]
    return _described(sizes, q.dtype, *numbers, scale, combine == "blend", threads)


@functools.lru_cache(maxsize=256)
def _described(
    sizes: tuple[int, ...],
    dtype: torch.dtype,
    segments: tuple[int, ...],
    plan_index: tuple[int, ...],
    segments_per_plan: int,
    scale: float,
    blend: bool,
    threads: int,
) -> tuple[Any, int]:
    """All of a call but its tensors, and the bytes of its workspace; the same for each block and step of a run."""
    call = extension().RegionalAttention(
        sizes=list(sizes),
        dtype=_DTYPES[dtype],
        segments=list(segments),
        plan_index=list(plan_index),
        segments_per_plan=segments_per_plan,
        scale=scale,
        blend=blend,
    )
    return call, call.workspace(threads) + 64


def _address(x: torch.Tensor) -> tuple[int, int, int, int]:
    batch, head, row, _ = x.stride()
    return (x.data_ptr(), batch, head, row)
