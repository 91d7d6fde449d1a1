"""Regional attention in C++: csrc/cpu/regional_attention_kernel.h says how."""

from __future__ import annotations

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
    call = _call(q, k.shape[1], plan, scale, combine)
    workspace = torch.empty(call.workspace(threads) + 64, dtype=torch.uint8)
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
    return int(_call(q, q.shape[1], plan, 1.0, combine).workspace(torch.get_num_threads())) + 64


def _call(q: torch.Tensor, kv_heads: int, plan: PlanTensors, scale: float, combine: str):  # type: ignore[no-untyped-def]
    batch, heads, queries, head_dim = q.shape
    return extension().RegionalAttention(
        sizes=[batch, heads, kv_heads, queries, head_dim],
        dtype=_DTYPES[q.dtype],
        segments=list(plan.segments_host),
        plan_index=list(plan.plan_index_host),
        segments_per_plan=plan.segments.shape[1],
        scale=scale,
        blend=combine == "blend",
    )


def _address(x: torch.Tensor) -> tuple[int, int, int, int]:
    return (x.data_ptr(), x.stride(0), x.stride(1), x.stride(2))
