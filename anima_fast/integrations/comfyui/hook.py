"""The hook on a model: gives it the regions' text and serves its cross-attention. Nothing here imports ComfyUI.

One wrapper around the diffusion model does everything. At each evaluation it sees the latent that is being denoised
(hence the token grid), the text and the options as they are after every other node has had its say; it passes on a
context of real rows only (each region's, then the row's own prompt) and a copy of the options in which
`override.CrossAttention` is the first override asked. A node that is applied later, at patch time, by a hook or in
ON_PREPARE_STATE, can therefore not replace it silently, and no state lives in ComfyUI's dicts. ON_CLEANUP ends a run:
it reports and forgets.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import torch

from ...bound_plan import BoundPlan
from .override import CrossAttention
from .regions import Layout, Region, Settings, bind_layouts, picture_of

__all__ = ["KEY", "ModelHook", "log"]

#: The key of the wrapper and the callback on a model.
KEY = "anima_fast"

log = logging.getLogger("anima_fast.comfyui")

# Plans kept: a few sizes, prompts and windows at once; the oldest goes first.
_MOST_PLANS = 16


class ModelHook:
    """Regions on a model (`regions` empty: only its pads are folded). `wrapper` and `cleanup` go on the patcher."""

    def __init__(
        self,
        regions: Sequence[Region] = (),
        settings: Settings | None = None,
        window: tuple[float, float] = (-math.inf, math.inf),
        title: str = "Anima Accelerate",
    ) -> None:
        self.regions = tuple(regions)
        self.settings = settings or Settings()
        self.title = title
        self._window = window
        self._plans: dict[Any, BoundPlan] = {}  # kept over runs: they depend on nothing that a run changes
        self._reset()

    def _reset(self) -> None:
        self._rows: dict[Any, int] = {}  # real rows of each prompt, by ComfyUI's id of it
        self._texts: dict[Any, tuple[torch.Tensor, list[tuple[int, int]], list[int]]] = {}
        self._evaluations = self._expected = self._served = 0
        self._debugged: set[int] = set()
        self._said: set[str] = set()

    def wrapper(self, executor: Any, x: torch.Tensor, timesteps: Any, context: Any, *args: Any, **kwargs: Any) -> Any:
        """A WrappersMP.DIFFUSION_MODEL wrapper."""
        options = kwargs.get("transformer_options") or {}
        context, kwargs["transformer_options"] = self._prepare(executor.class_obj, x, context, options)
        return executor(x, timesteps, context, *args, **kwargs)

    @torch.compiler.disable  # ComfyUI's TorchCompileModel drops the guards on everything reached through the options
    def _prepare(self, model: Any, x: torch.Tensor, context: Any, options: dict[str, Any]) -> tuple[Any, Any]:
        """Context and `transformer_options` of one evaluation."""
        self._evaluations += 1
        active = self._is_active(options)
        if active:
            self._expected += sum(self._in_blocks(block) for block in range(len(model.blocks)))
        reason = self._why_not(x, context, options)
        if reason is not None:
            self._say(f"{self.title}: not applied: {reason}.")
            return context, options
        override = self._override(model, x, context, options, active)
        return override.context, override.install(options)

    def cleanup(self, *_: Any) -> None:
        """A CallbacksMP.ON_CLEANUP callback: says how the run went and forgets it."""
        if self._evaluations:
            self._summarise()
        self._reset()

    def _summarise(self) -> None:
        served, expected = self._served, self._expected
        if expected == 0:
            low, high = self._window
            log.warning(
                "%s: none of %d model evaluations fell in the window (sigma %.4g to %.4g), so no region was applied. "
                "Change start_percent, end_percent, the blocks or the steps.",
                self.title, self._evaluations, high, low,
            )  # fmt: skip
        elif served == 0:
            log.warning(
                "%s: none of %d cross-attention calls was served: the picture was sampled without it. %s",
                self.title, expected, " ".join(sorted(self._said)) or "No call reached it.",
            )  # fmt: skip
        else:
            level = logging.INFO if served == expected else logging.WARNING
            log.log(level, "%s: served %d of %d cross-attention calls.", self.title, served, expected)

    def _say(self, message: str) -> None:
        """A warning, once a run."""
        if message not in self._said:
            self._said.add(message)
            log.warning("%s", message)

    def _is_active(self, options: dict[str, Any]) -> bool:
        low, high = self._window
        sigmas = options.get("sigmas")
        if (low == -math.inf and high == math.inf) or sigmas is None:
            return True
        # The one value read back from the device, once an evaluation and only where a window is set.
        return low <= float(sigmas.flatten()[0]) <= high

    def _in_blocks(self, block: int) -> bool:
        return self.settings.blocks is None or block in self.settings.blocks

    def _why_not(self, x: torch.Tensor, context: Any, options: dict[str, Any]) -> str | None:
        if x.ndim != 5:
            return f"the latent has shape {list(x.shape)}, not [batch, channels, frames, height, width]"
        if not isinstance(context, torch.Tensor) or context.ndim != 3 or context.shape[0] != x.shape[0]:
            return "the model was called without text of one entry a picture"
        if x.shape[0] % len(options.get("cond_or_uncond") or [0]):
            return f"a batch of {x.shape[0]} is not divisible by cond_or_uncond {options['cond_or_uncond']}"
        if torch.is_grad_enabled() and (x.requires_grad or context.requires_grad):
            return "gradients are asked for, and it is for inference"
        return self.settings.other_shape(self.regions, x.shape[-2], x.shape[-1]) if self.regions else None

    def _override(
        self, model: Any, x: torch.Tensor, context: torch.Tensor, options: dict[str, Any], active: bool
    ) -> CrossAttention:
        text, ranges, pad_counts = self._text(model, context)
        layouts = self._layouts(context, options, text.shape[0])
        given = context.new_zeros(len(layouts), max(1, *(a.start + a.rows for a in layouts)), context.shape[2])
        for row, layout in enumerate(layouts):
            if layout.regions:
                given[row, : layout.start] = text
            given[row, layout.start : layout.start + layout.rows] = context[row, : layout.rows]
        grid, canvas = picture_of(x.shape, getattr(model, "patch_spatial", 2))

        def bind(on: bool) -> BoundPlan:
            key = (layouts, tuple(ranges), tuple(pad_counts), grid, canvas, on, x.device)
            if key not in self._plans:
                if len(self._plans) >= _MOST_PLANS:
                    self._plans.pop(next(iter(self._plans)))
                self._plans[key] = bind_layouts(
                    layouts, self.settings, self.regions, ranges, pad_counts, grid, canvas, active=on, device=x.device
                )
            return self._plans[key]

        def report(block: int, reason: str | None) -> None:
            if reason is not None:
                self._say(f"{self.title}: a cross-attention call of block {block} was not served: {reason}.")
            elif active and self._in_blocks(block):
                self._served += 1

        def debug(block: int, q: torch.Tensor, k: torch.Tensor, out: torch.Tensor, plan: BoundPlan) -> None:
            if block not in self._debugged:
                self._debugged.add(block)
                log.info("%s", self._describe(block, q, k, out, plan, options))

        def plan_of(block: int) -> BoundPlan:
            return bind(active and self._in_blocks(block))

        wanted = debug if self.settings.debug else None
        return CrossAttention(plan_of, given, layouts, context.shape[1], report, wanted)

    def _text(self, model: Any, context: torch.Tensor) -> tuple[torch.Tensor, list[tuple[int, int]], list[int]]:
        """The regions' rows one after the other `[n, C]`, their ranges and pad counts. Once a run and device."""
        key = (context.device, context.dtype)
        if key not in self._texts:
            rows, ranges, pads, end = [context.new_zeros(0, context.shape[2])], [], [], 0
            for region in self.regions:
                assert region.prompt is not None
                text, count = region.prompt.rows(model, context)
                rows.append(text)
                ranges.append((end, end + len(text)))
                pads.append(count)
                end += len(text)
            self._texts[key] = (torch.cat(rows), ranges, pads)
        return self._texts[key]

    def _layouts(self, context: torch.Tensor, options: dict[str, Any], region_rows: int) -> tuple[Layout, ...]:
        """Where each batch row's own prompt goes: behind the regions in conditional rows, else at the front."""
        tags = options.get("cond_or_uncond") or [0]
        names = options.get("uuids") or [None] * len(tags)
        size = context.shape[0] // len(tags)
        layouts: list[Layout] = []
        for i, (tag, name) in enumerate(zip(tags, names, strict=True)):
            regional = bool(self.regions) and tag == 0
            rows = self._real_rows(context[i * size : (i + 1) * size], name)
            start = region_rows if regional else 0
            layouts += [Layout(regional, start, rows, context.shape[1] - rows)] * size
        return tuple(layouts)

    def _real_rows(self, prompt: torch.Tensor, name: Any) -> int:
        """Rows up to the last that is not zero. Read back from the device once a prompt and run."""
        key = None if name is None else (name, prompt.shape[1])
        if key is None or key not in self._rows:
            real = (prompt != 0).any(dim=2).any(dim=0).nonzero()
            count = int(real[-1]) + 1 if len(real) else 0
            if key is None:
                return count
            self._rows[key] = count
        return self._rows[key]

    def _describe(
        self,
        block: int,
        q: torch.Tensor,
        k: torch.Tensor,
        out: torch.Tensor,
        plan: BoundPlan,
        options: dict[str, Any],
    ) -> str:
        t = plan.tensors
        bias = t.bias[t.bias > -math.inf]
        span = f"{float(bias.min()):.4g} to {float(bias.max()):.4g}" if bias.numel() else "none"
        segments = ", ".join(f"{e - s} + {p} pads" for s, e, p in plan.segments if e > s or p)
        return (
            f"{self.title}: block {block}, q {list(q.shape)}, k {list(k.shape)}, {q.dtype}, grid {plan.grid}, "
            f"segments {segments}, {plan.combine} bias {span}, "
            f"NaN {int(out.isnan().sum())}, inf {int(out.isinf().sum())}, "
            f"cond_or_uncond {options.get('cond_or_uncond')}, plan of each row {list(t.plan_index_host)}"
        )
