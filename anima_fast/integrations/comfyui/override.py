"""Attention overrides: ComfyUI's `optimized_attention_override(func, q, k, v, heads, mask=None, …)`.

`CrossAttention` serves the cross-attention of one model evaluation. The functions below it are for other node packs:
each replaces the attention call inside a pack's own code. Nothing here imports ComfyUI.

A pack's call comes as `[B, H, N, D]` (skip_reshape=True) or `[B, N, H·D]`; the result is `[B, N, H·D]`, or
`[B, H, N, D]` with skip_output_reshape=True.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ...attention import regional_attention
from ...bound_plan import BoundPlan, bind_rows
from ...errors import invalid, wrong_type
from ...plan import RegionPlan
from .regions import Layout

__all__ = ["CrossAttention", "accelerate_bias_override", "couple_attention", "regional_override"]

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)

Attention = Callable[..., torch.Tensor]


class CrossAttention:
    """The override of one model evaluation, and the patches that tell cross- from self-attention.

    ComfyUI's Anima calls `attn2_patch` right before each cross-attention and `attn1_patch` right before each
    self-attention, so a mark set there says what the next attention call is, whatever its shapes. `install` puts the
    patches and the override into a copy of `transformer_options`; whatever override was there gets all other calls.
    The object lives as long as one evaluation, so clones of a model and devices share nothing.
    """

    def __init__(
        self,
        plan_of: Callable[[int], BoundPlan],
        context: torch.Tensor,
        layouts: Sequence[Layout],
        padded_rows: int,
        report: Callable[[int, str | None], None],
        debug: Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor, BoundPlan], None] | None = None,
    ) -> None:
        """
        Args:
            plan_of: the plan of a block.
            context: the text rows given to the model.
            layouts: where each batch row's own prompt lies in it.
            padded_rows: rows of the stock context, which a declined call gets back.
            report: called for each cross-attention call with its block, and the reason where it was declined.
            debug: called for each served call with block, q, k, output, plan.
        """
        self._plan_of, self.context, self._layouts = plan_of, context, layouts
        self._padded_rows, self._report, self._debug = padded_rows, report, debug
        self._previous: Callable[..., torch.Tensor] | None = None
        self._cross = False
        self._block = 0
        self._foreign_text = False

    def install(self, options: dict[str, Any]) -> dict[str, Any]:
        """A copy of `transformer_options` in which this override is the first one asked."""
        self._previous = options.get("optimized_attention_override")
        patches = dict(options.get("patches", {}))
        patches["attn1_patch"] = [*patches.get("attn1_patch", ()), self._mark_self]
        patches["attn2_patch"] = [*patches.get("attn2_patch", ()), self._mark_cross]
        return {**options, "patches": patches, "optimized_attention_override": self}

    # The next three are left out of torch.compile: TorchCompileModel drops the guards on what the options hold, so a
    # graph traced at one evaluation would serve the next with the first one's plan.
    @torch.compiler.disable
    def _mark_self(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **_: Any) -> dict[str, Any]:
        self._expire()
        return {}

    @torch.compiler.disable
    def _mark_cross(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, extra_options: dict[str, Any], **_: Any
    ) -> dict[str, Any]:
        self._expire()
        self._cross, self._block = True, extra_options.get("block_index", 0)
        self._foreign_text = k.shape != self.context.shape or v.shape != self.context.shape
        return {}

    def _expire(self) -> None:
        """A mark that no call used up: the attention went to somebody else."""
        if self._cross:
            self._report(self._block, "another extension computed the attention itself")
        self._cross = False

    @torch.compiler.disable
    def __call__(
        self, func: Attention, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        attend = func if self._previous is None else functools.partial(self._previous, func)
        cross, self._cross = self._cross, False
        if not cross:
            return attend(q, k, v, heads, *args, **kwargs)
        plan = self._plan_of(self._block)
        reason = self._why_not(q, k, v, heads, plan, args, kwargs)
        self._report(self._block, reason)
        if reason is None:
            out = _attend(q, k, v, heads, plan, **kwargs)
            if self._debug is not None:
                self._debug(self._block, q, k, out, plan)
            return out
        if not self._foreign_text and k.shape[-2] == self.context.shape[1]:
            k, v = self._stock(k), self._stock(v)
        return attend(q, k, v, heads, *args, **kwargs)

    def _why_not(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        heads: int,
        plan: BoundPlan,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> str | None:
        if self._foreign_text:
            return "another extension's attn2_patch changed the number of text rows"
        if args or kwargs.get("mask") is not None:
            return "the call comes with an attention mask"
        if q.shape[-2] != plan.queries:
            return f"{q.shape[-2]} queries where the picture has {plan.queries} tokens"
        if k.shape[-2] != self.context.shape[1] or q.shape[0] != len(self._layouts):
            return f"{q.shape[0]} x {k.shape[-2]} text rows where {list(self.context.shape[:2])} were given"
        return _why_not_tensors(q, k, v, heads, kwargs)

    def _stock(self, x: torch.Tensor) -> torch.Tensor:
        """K or V as the stock model would have it: each row's own prompt first, then its zero pads."""
        shape = (*x.shape[:-2], self._padded_rows, x.shape[-1])
        stock = x.new_zeros(shape)
        for row, layout in enumerate(self._layouts):
            stock[row, ..., : layout.rows, :] = x[row, ..., layout.start : layout.start + layout.rows, :]
        return stock


def _why_not_tensors(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, kwargs: dict[str, Any]
) -> str | None:
    if q.dtype not in _FLOATS or k.dtype != q.dtype or v.dtype != q.dtype:
        return f"tensors of type {q.dtype}, {k.dtype}, {v.dtype}"
    if q.device != k.device or q.device != v.device:
        return f"tensors on {q.device}, {k.device}, {v.device}"
    head_dim = q.shape[-1] if kwargs.get("skip_reshape") else q.shape[-1] // heads
    if head_dim > 256:
        return f"heads of {head_dim} channels (up to 256 are served)"
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return "gradients are asked for"
    return None


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    heads: int,
    plan: BoundPlan,
    *,
    skip_reshape: bool = False,
    skip_output_reshape: bool = False,
    scale: float | None = None,
    **_: Any,
) -> torch.Tensor:
    """`regional_attention` in ComfyUI's layouts."""
    if not skip_reshape:
        q, k, v = (x.unflatten(2, (-1, q.shape[2] // heads)).transpose(1, 2) for x in (q, k, v))
    out = regional_attention(q, k, v, plan, scale=scale)
    assert isinstance(out, torch.Tensor)
    return out if skip_output_reshape else out.transpose(1, 2).flatten(2)


# --- For other node packs.


def regional_override(
    plan: BoundPlan | Sequence[BoundPlan],
    func: Attention,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    heads: int,
    **kwargs: Any,
) -> torch.Tensor:
    """One cross-attention call of a pack that concatenates its prompts, served by a plan instead of a mask.

    Args:
        plan: a bound plan for every row; or (cond, uncond) plans, told apart by `cond_or_uncond`.
        func, q, k, v, heads, kwargs: what the pack's override was called with.

    Raises ValueError where the plan does not fit q and k: the pack knows which calls are its own.

    Example:
        >>> def override(func, q, k, v, heads, **kwargs):
        ...     return regional_override((regions, uncond), func, q, k, v, heads, **kwargs)
    """
    plans = (plan,) if isinstance(plan, BoundPlan) else tuple(plan)
    if len(plans) not in (1, 2):
        raise invalid("plan", f"{len(plans)} plans", "one plan, or a cond and an uncond plan")
    tags = _tags(q.shape[0], kwargs) if len(plans) == 2 else [0]
    bound = plans[0] if len(set(tags)) == 1 and tags[0] == 0 else _batch(plans, tuple(tags))
    kwargs.pop("mask", None)
    return _attend(q, k, v, heads, bound.to(q.device) if bound.device != q.device else bound, **kwargs)


def accelerate_bias_override(
    func: Attention,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    heads: int,
    *,
    template: torch.Tensor,
    **kwargs: Any,
) -> torch.Tensor:
    """One cross-attention call of a pack that adds a materialised bias, served without materialising it.

    Args:
        func, q, k, v, heads, kwargs: what the pack's override was called with, `transformer_options` among them.
        template: the bias `[1, 1, Nq, Nt]`, natural-log units, whose columns are equal within each prompt. Text rows
            past Nt, such as Anima's zero pads, get the template's lowest value.

    Rows that `cond_or_uncond` calls unconditional get ordinary attention. The template is analysed once and
    remembered as long as it lives; it must not be changed in place.

    Raises ValueError where the template does not fit q and k or is not of this form.

    Example:
        >>> bias = transformer_options["anima_regional_bias_template"]
        >>> return accelerate_bias_override(func, q, k, v, heads, template=bias, **kwargs)
    """
    if not isinstance(template, torch.Tensor) or template.ndim != 4:
        raise wrong_type("template", template, "a tensor [1, 1, Nq, Nt]")
    if template.shape[2] != q.shape[-2] or template.shape[3] > k.shape[-2]:
        got = f"{template.shape[2]} x {template.shape[3]} (queries x text rows)"
        raise invalid("template", got, f"{q.shape[-2]} queries as q, at most the {k.shape[-2]} text rows of k")
    plans = _plans_of(template, k)
    return regional_override(plans, func, q, k, v, heads, **kwargs)


def couple_attention(
    q: torch.Tensor,
    k: Sequence[torch.Tensor],
    v: Sequence[torch.Tensor],
    weights: torch.Tensor,
    *,
    heads: int | None = None,
    pad_counts: Sequence[int] | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """Σ_r ŵ_r(i) · softmax(q k_rᵀ) v_r in one pass: what Attention Couple packs compute with one attention a prompt.

    Args:
        q: `[B, H, Nq, D]`, or `[B, Nq, H·D]` with `heads`.
        k, v: one tensor a prompt, laid out as q.
        weights: `[R, Nq]` or `[R, Ht, Wt]`, >= 0; each query's weights are divided by their sum.
        pad_counts: zero rows that belong to each prompt and were left out of k and v.
        scale: factor of q·k; default D ** -0.5.

    Returns the output laid out as q.

    Example:
        >>> out = couple_attention(q, [k_left, k_right], [v_left, v_right], torch.stack([left, 1 - left]))
    """
    if len(k) != len(v) or not k:
        raise invalid("k, v", f"{len(k)} and {len(v)} tensors", "as many of one as of the other, at least one")
    weights = weights.flatten(1)
    if weights.shape != (len(k), q.shape[-2]):
        raise invalid(
            "weights", f"shape {list(weights.shape)}", f"[{len(k)}, {q.shape[-2]}]: a weight a prompt and query"
        )
    rows = -2 if heads is None else 1
    lengths = tuple(x.shape[rows] for x in k)
    pads = (0,) * len(k) if pad_counts is None else tuple(pad_counts)
    plan = _blend_plan(weights, lengths, pads).to(q.device)
    joined = (torch.cat(list(k), dim=rows), torch.cat(list(v), dim=rows))
    layout = "bhnd" if heads is None else "packed"
    out = regional_attention(q, *joined, plan, scale=scale, heads=heads, layout=layout)
    assert isinstance(out, torch.Tensor)
    return out


def _tags(rows: int, kwargs: dict[str, Any]) -> list[int]:
    """`cond_or_uncond` of each batch row; all conditional where nothing is said."""
    tags = (kwargs.get("transformer_options") or {}).get("cond_or_uncond") or [0]
    if rows % len(tags):
        raise invalid("cond_or_uncond", f"{len(tags)} entries for {rows} rows", "a divisor of the batch")
    return [int(tag == 1) for tag in tags for _ in range(rows // len(tags))]


@functools.lru_cache(maxsize=32)
def _batch(plans: tuple[BoundPlan, ...], tags: tuple[int, ...]) -> BoundPlan:
    return BoundPlan.batch(plans, tags)


class _ByTensor:
    """What was made of a tensor, remembered as long as the tensor lives and is not written to."""

    def __init__(self) -> None:
        self._made: dict[int, tuple[weakref.ref[torch.Tensor], dict[Any, Any]]] = {}

    def get(self, tensor: torch.Tensor, key: Any, make: Callable[[], Any]) -> Any:
        number = id(tensor)
        version = None if tensor.is_inference() else tensor._version
        if number not in self._made:
            self._made[number] = (weakref.ref(tensor, lambda _: self._made.pop(number, None)), {})
        made = self._made[number][1]
        if (key, version) not in made:
            made[key, version] = make()
        return made[key, version]


_plans = _ByTensor()


def _plans_of(template: torch.Tensor, k: torch.Tensor) -> tuple[BoundPlan, BoundPlan]:
    """(regions, plain) plans of a template for k's rows, on k's device."""

    def make() -> tuple[BoundPlan, BoundPlan]:
        columns, rows = template.shape[3], k.shape[-2]
        bias, lowest, pads = template[0, 0].float().cpu(), float(template.min()), rows - columns
        if pads and bool(k[..., columns:, :].any()):  # rows of text, not pads
            bias = torch.nn.functional.pad(bias, (0, pads), value=lowest)
            pads = 0
        regions = RegionPlan.from_bias(bias, pad_count=pads, pad_bias=lowest)
        plain = RegionPlan.plain(rows).bind(regions.grid)
        return regions.to(k.device), plain.to(k.device)

    made: tuple[BoundPlan, BoundPlan] = _plans.get(template, (k.shape[-2], k.device), make)
    return made


def _blend_plan(weights: torch.Tensor, lengths: tuple[int, ...], pads: tuple[int, ...]) -> BoundPlan:
    def make() -> BoundPlan:
        ends = torch.tensor(lengths).cumsum(0).tolist()
        segments = [(end - n, end, p) for end, n, p in zip(ends, lengths, pads, strict=True)]
        if not bool((weights >= 0).all()):
            raise invalid("weights", "negative or NaN values", ">= 0")
        return bind_rows(weights.float().cpu(), segments, "blend", (1, 1, weights.shape[1]))

    plan: BoundPlan = _plans.get(weights, (lengths, pads), make)
    return plan
