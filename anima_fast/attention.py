"""regional_attention: attention over several prompts, each counting where its mask says.

    q [B, H, Nq, D]     one query a token of the image grid
    k, v [B, Hk, Nk, D] the concatenated prompts; H a multiple of Hk (grouped-query heads)
    plan                a `BoundPlan`: ranges, pad counts and per-query bias or weights (see plan.py)

One softmax over all prompts (combine="logit") or one a prompt, mixed (combine="blend"); pads enter the
denominator analytically. Nothing of size Nq x Nk is allocated by any backend but `reference`.

The op is `torch.ops.anima_fast.regional_attention`; the backends behind it are listed at the end.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import Any

import torch

from . import dispatch
from .bound_plan import BoundPlan, PlanTensors
from .errors import invalid, wrong_type
from .tensor_checks import check_no_gradients

__all__ = ["regional_attention"]

LAYOUTS = ("bhnd", "bnhd", "packed")


def regional_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: BoundPlan,
    *,
    scale: float | None = None,
    mask: torch.Tensor | None = None,
    heads: int | None = None,
    layout: str = "bhnd",
    backend: str | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention of q to the prompts in k and v, weighted by region.

    Args:
        q: `[B, H, Nq, D]`, fp32, fp16 or bf16 (fp64 in `reference`), any strides with unit last stride.
        k, v: `[B, Hk, Nk, D]`, as q; H a multiple of Hk.
        plan: a `BoundPlan` for Nq queries on q's device.
        scale: factor of q·k; default D ** -0.5.
        mask: extra mask, broadcastable to `[B, H, Nq, Nk]`: additive float, or bool with True = attend. Pads
            get none of it; a query for which it leaves no key and no pad gives 0.
        heads: H, for `layout="packed"` only.
        layout: "bhnd"; "bnhd": `[B, N, H, D]`; "packed": `[B, N, H*D]`, k and v with H or fewer heads.
        backend: force one ("cpu", "triton", "torch", "reference"); default: the first that fits.
        return_lse: also return the log of the softmax denominator, pads included, fp32 `[B, H, Nq]`
            (combine="logit" only).

    Returns:
        The output in q's type and layout (memory `[B, Nq, H, D]`), and the lse if asked for.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is allowed.
        NoBackendError: no backend, or not the forced one, can serve the call; with each one's reason.

    Example:
        >>> plan = RegionPlan.from_masks([left, 1 - left], [(0, 77), (77, 154)]).bind((1, 64, 64))
        >>> q = torch.randn(1, 16, 4096, 128); k = v = torch.randn(1, 16, 154, 128)
        >>> regional_attention(q, k, v, plan).shape
        torch.Size([1, 16, 4096, 128])
    """
    q, k, v = _to_bhnd(q, k, v, heads, layout)
    _check(q, k, v, plan, mask, return_lse)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if not -float("inf") < scale < float("inf"):
        raise invalid("scale", f"{scale}", "a finite number")
    if mask is not None:
        mask = mask.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    t = plan.tensors
    arguments = (
        q,
        k,
        v,
        t.bias,
        t.order,
        t.segments,
        t.plan_index,
        t.segments_host,
        t.plan_index_host,
        t.groups_host,
        scale,
        plan.combine,
        mask,
        backend or "",
    )
    lse = None
    if return_lse:
        out, lse = _regional_attention_lse(*arguments)
    else:
        out = _regional_attention(*arguments)
    if layout != "bhnd":
        out = out.transpose(1, 2)
    if layout == "packed":
        out = out.flatten(2)
    return out if lse is None else (out, lse)


def _to_bhnd(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int | None, layout: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if layout not in LAYOUTS:
        raise invalid("layout", repr(layout), " | ".join(map(repr, LAYOUTS)))
    if (heads is not None) != (layout == "packed"):
        raise invalid("heads", f"{heads} with layout={layout!r}", "a number with layout='packed', else None")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, torch.Tensor):
            raise wrong_type(name, x, "a tensor")
        if x.ndim != (3 if layout == "packed" else 4):
            shape = {"bhnd": "[B, H, N, D]", "bnhd": "[B, N, H, D]", "packed": "[B, N, H*D]"}[layout]
            raise invalid(name, f"shape {list(x.shape)}", f"{shape} with layout={layout!r}")
    if layout == "packed":
        assert heads is not None
        if heads < 1 or q.shape[2] % heads:
            raise invalid("heads", f"{heads} for q of width {q.shape[2]}", "a divisor of q's last size")
        head_dim = q.shape[2] // heads
        for name, x in (("k", k), ("v", v)):
            if head_dim == 0 or x.shape[2] % head_dim:
                raise invalid(name, f"width {x.shape[2]}", f"a multiple of the head dim {head_dim}")
        q, k, v = (x.unflatten(2, (-1, head_dim)) for x in (q, k, v))
    return (q, k, v) if layout == "bhnd" else (q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))


def _check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: BoundPlan,
    mask: torch.Tensor | None,
    return_lse: bool,
) -> None:
    """Everything that can be told from shapes and host numbers. Tensors are `[B, H, N, D]`."""
    batch, heads, queries, head_dim = q.shape
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise invalid(name, f"{x.dtype}", f"{q.dtype}, as q")
        if x.device != q.device:
            raise invalid(name, f"device {x.device}", f"{q.device}, as q")
        if x.shape[0] != batch or x.shape[3] != head_dim:
            raise invalid(name, f"[B, H, N, D] = {list(x.shape)}", f"B = {batch} and D = {head_dim}, as q")
    if k.shape != v.shape:
        raise invalid("v", f"[B, H, N, D] = {list(v.shape)}", f"{list(k.shape)}, as k")
    if k.shape[1] == 0 or heads % k.shape[1]:
        raise invalid("k", f"{k.shape[1]} heads for {heads} heads of q", "a divisor of q's heads")
    check_no_gradients(q, k, v)
    if not isinstance(plan, BoundPlan):
        raise wrong_type("plan", plan, "a BoundPlan (RegionPlan.bind makes one)")
    if plan.queries != queries:
        raise invalid("plan", f"a plan for grid {plan.grid}, {plan.queries} queries", f"{queries} queries, as q")
    if plan.device != q.device:
        raise invalid("plan", f"a plan on {plan.device}", f"{q.device}, as q: plan.to({str(q.device)!r})")
    rows = plan.tensors.plan_index.shape[0]
    if rows not in (1, batch):
        raise invalid("plan", f"a plan for a batch of {rows}", f"a batch of {batch}, as q")
    if plan.context_length > k.shape[2]:
        raise invalid("plan", f"ranges up to row {plan.context_length}", f"the {k.shape[2]} rows of k")
    if return_lse and plan.combine != "logit":
        raise invalid("return_lse", "True with combine='blend'", "combine='logit', which has one softmax")
    if mask is not None:
        if not isinstance(mask, torch.Tensor):
            raise wrong_type("mask", mask, "a tensor")
        if not (mask.dtype == torch.bool or mask.dtype.is_floating_point):
            raise invalid("mask", f"{mask.dtype}", "bool (True = attend) or an additive float")
        if mask.device != q.device:
            raise invalid("mask", f"device {mask.device}", f"{q.device}, as q")
        full = (batch, heads, queries, k.shape[2])
        sizes = zip(reversed(mask.shape), reversed(full), strict=False)
        if mask.ndim > 4 or any(have not in (1, want) for have, want in sizes):
            raise invalid("mask", f"shape {list(mask.shape)}", f"broadcastable to {list(full)}")


_ARGUMENTS = (
    "(Tensor q, Tensor k, Tensor v, Tensor bias, Tensor order, Tensor segments, Tensor plan_index, "
    "int[] segments_host, int[] plan_index_host, int[] groups_host, float scale, str combine, Tensor? mask, "
    "str backend)"
)
torch.library.define("anima_fast::regional_attention", _ARGUMENTS + " -> Tensor")
torch.library.define("anima_fast::regional_attention_lse", _ARGUMENTS + " -> (Tensor, Tensor)")


def _new_out(q: torch.Tensor) -> torch.Tensor:
    batch, heads, queries, head_dim = q.shape
    return q.new_empty(batch, queries, heads, head_dim).transpose(1, 2)


def _new_lse(q: torch.Tensor) -> torch.Tensor:
    return q.new_empty(q.shape[:3], dtype=torch.float32)


def _run(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor,
    order: torch.Tensor,
    segments: torch.Tensor,
    plan_index: torch.Tensor,
    segments_host: list[int],
    plan_index_host: list[int],
    groups_host: list[int],
    scale: float,
    combine: str,
    mask: torch.Tensor | None,
    backend: str,
    *,
    lse: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    check_no_gradients(q, k, v)
    q, k, v = (x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous() for x in (q, k, v))
    index = tuple(plan_index_host)
    if len(index) != q.shape[0]:
        plan_index, index = _repeated(index[0], q.shape[0], q.device), index * q.shape[0]
    plan = PlanTensors(bias, order, segments, plan_index, tuple(segments_host), index, tuple(groups_host))
    chosen = OP.select(_facts_of(q, mask is not None, combine, lse), backend or None)
    out = _new_out(q)
    log = _new_lse(q) if lse else None
    if q.numel():
        chosen.implementation(q, k, v, out, log, plan, scale=scale, combine=combine, mask=mask)
    return out, log


@functools.lru_cache(maxsize=64)
def _repeated(value: int, count: int, device: torch.device) -> torch.Tensor:
    """One plan for every row, kept so that a call allocates nothing and copies nothing to the device."""
    return torch.full((count,), value, dtype=torch.int32, device=device)


@dispatch.torch_op("regional_attention")
def _regional_attention(*arguments: Any) -> torch.Tensor:
    return _run(*arguments, lse=False)[0]


@dispatch.torch_op("regional_attention_lse")
def _regional_attention_lse(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = _run(*arguments, lse=True)
    assert lse is not None
    return out, lse


@torch.library.register_fake("anima_fast::regional_attention")
def _(q: torch.Tensor, *rest: Any) -> torch.Tensor:
    return _new_out(q)


@torch.library.register_fake("anima_fast::regional_attention_lse")
def _(q: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return _new_out(q), _new_lse(q)


def workspace_bytes(
    plan: BoundPlan, *, batch: int, heads: int, head_dim: int, dtype: torch.dtype, backend: str | None = None
) -> int:
    """Bytes of temporaries that the backend of such a call allocates (`BoundPlan.estimate_bytes`)."""
    q = torch.empty(batch, heads, plan.queries, head_dim, dtype=dtype, device="meta")
    facts = dict(_facts_of(q, False, plan.combine, False), device=plan.device.type)
    chosen = OP.select(facts, backend)
    t = plan.tensors
    index = t.plan_index_host * (batch if len(t.plan_index_host) == 1 else 1)
    return int(chosen.attribute("workspace_bytes")(q, t._replace(plan_index_host=index), combine=plan.combine))


def _facts_of(q: torch.Tensor, mask: bool, combine: str, lse: bool) -> dispatch.Facts:
    return {
        "device": q.device.type,
        "index": q.device.index,
        "dtype": q.dtype,
        "head_dim": q.shape[-1],
        "mask": mask,
        "combine": combine,
        "lse": lse,
    }


def _facts(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: BoundPlan,
    *,
    mask: torch.Tensor | None = None,
    heads: int | None = None,
    layout: str = "bhnd",
    return_lse: bool = False,
    **_: Any,
) -> dispatch.Facts:
    """The facts of a public call (`explain`)."""
    q, k, v = _to_bhnd(q, k, v, heads, layout)
    _check(q, k, v, plan, mask, return_lse)
    return _facts_of(q, mask is not None, plan.combine, return_lse)


def _cpu_unavailable() -> str | None:
    from .ops.extension import unavailable

    return unavailable()


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _triton_unavailable() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton; on Windows triton-windows)"
    if _interpreted():
        return None
    if torch.version.hip:
        return "its launch configurations are for NVIDIA cards; this torch is built for ROCm"
    return None if torch.cuda.is_available() else "no CUDA device (TRITON_INTERPRET=1 runs it slowly on a CPU)"


def _triton_supports(facts: dispatch.Facts) -> str | None:
    """The device, and what the kernel's table of launch configurations leaves out."""
    interpreted = _interpreted()
    if facts["device"] != "cuda" and not (interpreted and facts["device"] == "cpu"):
        return f"needs a CUDA device; got {facts['device']}"
    from .kernels.regional_attention import supports

    capability = (8, 0) if facts["device"] == "cpu" else torch.cuda.get_device_capability(facts["index"])
    return supports(facts["dtype"], facts["head_dim"], facts["combine"], capability)


_FLOATS = (torch.float32, torch.float16, torch.bfloat16)

OP = dispatch.register(
    dispatch.Op(
        name="regional_attention",
        facts=_facts,
        backends=(
            dispatch.Backend(
                "cpu",
                "anima_fast.ops.cpu.regional_attention:regional_attention",
                (
                    dispatch.one_of("device", "cpu"),
                    dispatch.one_of("dtype", *_FLOATS),
                    dispatch.within("head_dim", 1, 256),
                    dispatch.without("mask", "an extra mask"),
                ),
                _cpu_unavailable,
            ),
            dispatch.Backend(
                "triton",
                "anima_fast.kernels.regional_attention:regional_attention",
                (
                    dispatch.one_of("dtype", *_FLOATS),
                    dispatch.within("head_dim", 16, 256),
                    dispatch.without("mask", "an extra mask"),
                    dispatch.Constraint("a configuration for the card", _triton_supports),
                ),
                _triton_unavailable,
            ),
            dispatch.Backend(
                "torch",
                "anima_fast.ops.torch.regional_attention:regional_attention",
                (dispatch.one_of("dtype", *_FLOATS), dispatch.within("head_dim", 1, 256)),
            ),
            dispatch.Backend(
                "reference",
                "anima_fast.reference.regional_attention:regional_attention",
                (dispatch.one_of("dtype", *_FLOATS, torch.float64),),
            ),
        ),
    )
)
