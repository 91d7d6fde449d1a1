"""Regional prompts in diffusers' Anima pipeline (`AnimaModularPipeline`, text to image and image to image).

    from anima_fast.integrations.diffusers import Region, disable, enable
    enable(pipe, regions=[Region("left.png", "a red house"), Region("right.png", "a tree")])
    pipe(prompt="a village street, evening").images      # the prompt is the base prompt
    disable(pipe)                                        # or: with enable(...):

How it works: each region's text goes through the pipeline's text encoder and text conditioner by itself. A processor
on every block's cross-attention (`attn2`) then attends to all prompts at once, with the regions' bias, through the
layer's own projections, so that LoRA layers act. Rows of zeros that pad a prompt are counted, not computed. Which call
of the transformer is the conditional one is the guider's word; the others attend to their own prompt. `disable` puts
the very same processors back. Without regions, `enable(pipe)` only folds the pads: the same picture, sooner.

Regions belong to the transformer: of several pipelines that share one, run the one that was enabled.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import itertools
import logging
import re
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, NamedTuple

import torch

from ..attention import OP, regional_attention
from ..bound_plan import BoundPlan
from ..checks import check_number
from ..errors import invalid, wrong_type
from ..masks import load_mask
from ..plan import RegionPlan

__all__ = ["PLAN_KEYWORDS", "Enabled", "Region", "disable", "enable", "percent_to_sigma"]

_log = logging.getLogger(__name__)

OUTSIDE = ("all", "base")
_COMPONENTS = ("transformer", "text_encoder", "tokenizer", "t5_tokenizer", "text_conditioner", "scheduler", "guider")
_FROM_REGIONS = (
    "masks",
    "token_ranges",
    "pad_counts",
    "base_range",
    "base_pad_count",
    "region_strengths",
    "priorities",
)
#: What `enable` passes on to `RegionPlan.from_masks`.
PLAN_KEYWORDS = tuple(name for name in inspect.signature(RegionPlan.from_masks).parameters if name not in _FROM_REGIONS)
# What errors of RegionPlan.from_masks call a region's values, and what they are called here.
_FIELD_OF = {"masks": "mask", "region_strengths": "strength", "priorities": "priority"}

# Schedules are fp32: a step that lies on the window's edge belongs to it.
_SIGMA_TOLERANCE = 1e-6

_WHOLE = (0.0, 0.0, 1.0, 1.0)  # top, left, bottom, right


@dataclasses.dataclass(frozen=True)
class Region:
    """A prompt and where it counts.

    Attributes:
        mask: file, array, tensor or PIL image, any size (`masks.load_mask`).
        prompt: its text, encoded apart from all others.
        strength: factor of its bias (blend: weight), >= 0.
        priority: regions of a higher one take their pixels from those of lower ones.
    """

    mask: Any
    prompt: str
    strength: float = 1.0
    priority: float = 0.0


class Enabled:
    """What `enable` returns; as a context manager, it ends with `disable`.

    Attributes:
        served: how often cross-attention was computed here, by kind: "regions" (biased), "outside" (conditional, out of
            the window of steps or of the blocks), "plain" (the negative prompt; every call without regions).
        declined: how often it was left to diffusers, by reason.
    """

    def __init__(self, pipe: Any, state: _State) -> None:
        self._pipe = pipe
        self.served = state.served
        self.declined = state.declined

    def __enter__(self) -> Enabled:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        disable(self._pipe)

    def __repr__(self) -> str:
        return f"Enabled(served={dict(self.served)}, declined={dict(self.declined)})"


def enable(
    pipe: Any,
    regions: Sequence[Region | Mapping[str, Any]] | Sequence[Sequence[Region | Mapping[str, Any]]] = (),
    *,
    start_percent: float = 0.0,
    end_percent: float = 1.0,
    outside: str = "all",
    base: bool = True,
    blocks: Iterable[int] | None = None,
    max_sequence_length: int = 512,
    backend: str | None = None,
    strength: float | None = None,
    **plan: Any,
) -> Enabled:
    """Gives the pipeline regional prompts until `disable`; enabling again replaces them.

    Args:
        pipe: an `AnimaModularPipeline` with its components loaded. Encodes the regions' texts now, on its device.
        regions: `Region`s, or mappings with their fields; none: only fold the pads. Or a list of such lists, one for
            each prompt of a list that the pipeline is then called with: a batch of different layouts in one launch.
            Each of its pictures is then, up to rounding, what the pipeline gives for it alone.
        start_percent, end_percent: the part of sampling in which regions act, as in ComfyUI: sigma from
            shift·(1-p) / (1 + (shift-1)·(1-p)) of the start to that of the end, whatever the number of steps.
        outside: what the conditional call attends to out of that window: "all" prompts, unbiased, or only the "base".
        base: whether the prompt that the pipeline is called with counts among the regions, as the base prompt.
        blocks: numbers of the transformer's blocks where regions act (negative: from the end); others do as outside
            the window. Default: all.
        max_sequence_length: tokens after which a region's prompt is cut off, as the pipeline's argument.
        backend: force one for the attention (`regional_attention`).
        strength: factor of every region's bias (blend: weight). Default: 0.35 for soft_log bias, as in the ComfyUI
            nodes; else 1.
        plan: any other keyword of `RegionPlan.from_masks` (`PLAN_KEYWORDS`): mode, combine, eps, hard_value, …

    Returns:
        An `Enabled`: counts what was served; `with enable(…):` disables at the end of the block.

    Raises:
        TypeError, ValueError, FileNotFoundError: naming the argument, what came and what is allowed.

    Warns:
        UserWarning: a region's prompt is longer than max_sequence_length.

    Example:
        >>> with enable(pipe, [Region("left.png", "a red house"), Region("right.png", "a tree")], mode="hard"):
        ...     picture = pipe(prompt="a street", num_inference_steps=30).images[0]
        >>> with enable(pipe, [[Region("left.png", "a red house")], [Region("top.png", "clouds")]]):
        ...     pictures = pipe(prompt=["a street", "a field"], negative_prompt=["", ""]).images
    """
    _check_pipe(pipe)
    for name in plan:
        if name not in PLAN_KEYWORDS:
            raise TypeError(f"enable: got the unknown argument {name!r}; allowed: {', '.join(PLAN_KEYWORDS)}")
    if outside not in OUTSIDE:
        raise invalid("outside", repr(outside), " | ".join(map(repr, OUTSIDE)))
    share = "a number from 0 to 1"
    start = check_number("start_percent", start_percent, share, lambda x: 0 <= x <= 1)
    end = check_number("end_percent", end_percent, share, lambda x: 0 <= x <= 1)
    if end < start:
        raise invalid("end_percent", f"{end:g}, before start_percent = {start:g}", "start_percent or more")
    dynamic = getattr(pipe.scheduler.config, "use_dynamic_shifting", False)
    if (start, end) != (0.0, 1.0) and dynamic:
        raise invalid(
            "start_percent, end_percent",
            f"{start:g} and {end:g} with a scheduler whose shift depends on the picture's size",
            "0 and 1, or a scheduler with use_dynamic_shifting=False",
        )
    if not isinstance(max_sequence_length, int) or max_sequence_length < 1:
        raise invalid("max_sequence_length", repr(max_sequence_length), "a whole number >= 1")
    known = [known.name for known in OP.backends]
    if backend is not None and backend not in known:
        raise invalid("backend", repr(backend), " | ".join(map(repr, known)))
    if strength is None:
        soft = plan.get("mode", "soft_log") == "soft_log" and plan.get("combine", "logit") == "logit"
        strength = 0.35 if soft else 1.0
    state = _State(
        pipe=weakref.ref(pipe),
        rows=_read_rows(regions),
        plan_keywords={**plan, "strength": strength},
        window=(start, end),
        outside=outside,
        base=bool(base),
        blocks=_check_blocks(blocks, len(pipe.transformer.transformer_blocks)),
        backend=backend,
    )
    with torch.no_grad():
        state.encode(pipe, max_sequence_length)
        state.condition(pipe)
    disable(pipe)  # only now: what is refused leaves everything as it was
    state.install(pipe)
    return Enabled(pipe, state)


def disable(pipe: Any) -> None:
    """Puts back what `enable` replaced: the pipeline computes as before, bit for bit. Else it does nothing.

    Example:
        >>> disable(pipe)
    """
    state = getattr(getattr(pipe, "transformer", None), "_anima_fast", None)
    if state is not None:
        state.uninstall(pipe.transformer)


def percent_to_sigma(percent: float, shift: float) -> float:
    """The noise level at a share of sampling, for a flow model: ComfyUI's mapping.

    Example:
        >>> percent_to_sigma(0.5, shift=3.0)
        0.75
    """
    left = 1 - percent
    return shift * left / (1 + (shift - 1) * left)


class _Text(NamedTuple):
    """A region's prompt as the text conditioner takes it; `tokens` of its rows are real."""

    conditioner_inputs: dict[str, torch.Tensor]
    tokens: int


class _Call(NamedTuple):
    """What the processors compute for one prompt tensor of the pipeline, on one grid."""

    embeds: weakref.ref[torch.Tensor]
    grid: tuple[int, int, int]
    context: dict[str, torch.Tensor]  # by kind
    plan: dict[str, BoundPlan]


@dataclasses.dataclass(eq=False)
class _State:
    """The regions of one transformer. `current` is what its running call does; None: no call, or a declined one."""

    pipe: weakref.ref[Any]
    rows: tuple[tuple[Region, ...], ...]  # of each prompt; one: of every prompt
    plan_keywords: dict[str, Any]
    window: tuple[float, float]
    outside: str
    base: bool
    blocks: frozenset[int]
    backend: str | None
    texts: dict[str, _Text] = dataclasses.field(default_factory=dict)  # by prompt
    contexts: tuple[tuple[torch.Tensor, ...], ...] = ()  # of each row's regions
    plans: tuple[RegionPlan | None, ...] = ()  # of each row; None: it has no regions
    conditioning: bool = False
    current: tuple[_Call, bool, bool] | None = None  # the call, whether it has regions, whether they act
    # By whether it is conditional, and tile: those with the last conditional prompts and with the last others.
    calls: dict[tuple[bool, tuple[float, ...]], _Call] = dataclasses.field(default_factory=dict)
    sigmas: tuple[weakref.ref[torch.Tensor], list[float]] | None = None
    served: Counter[str] = dataclasses.field(default_factory=Counter)
    declined: Counter[str] = dataclasses.field(default_factory=Counter)
    processors: list[tuple[Any, _Processor]] = dataclasses.field(default_factory=list)
    hooks: list[Any] = dataclasses.field(default_factory=list)

    # ------------------------------------------------------------------------------------------------ the prompts

    def encode(self, pipe: Any, max_sequence_length: int) -> None:
        """The regions' texts through the text encoder, once."""
        encoder = importlib.import_module("diffusers.modular_pipelines.anima.encoders").AnimaTextEncoderStep
        for row, i, region in (
            (row, i, region) for row, regions in enumerate(self.rows) for i, region in enumerate(regions)
        ):
            if region.prompt in self.texts:
                continue
            length = len(pipe.t5_tokenizer(region.prompt).input_ids)
            if length > max_sequence_length:
                warnings.warn(
                    f"{self._name(row)}[{i}].prompt has {length} tokens and is cut off after max_sequence_length = "
                    f"{max_sequence_length}",
                    stacklevel=3,
                )
            found = encoder.encode_prompt(
                pipe, region.prompt, prepare_unconditional_embeds=False, max_sequence_length=max_sequence_length
            )
            inputs = {
                "source_hidden_states": found["qwen_prompt_embeds"],
                "source_attention_mask": found["qwen_attention_mask"],
                "target_input_ids": found["t5_input_ids"],
                "target_attention_mask": found["t5_attention_mask"],
            }
            self.texts[region.prompt] = _Text(inputs, int(found["t5_attention_mask"].sum()))

    def _name(self, row: int) -> str:
        """What errors call a row's regions."""
        return f"regions[{row}]" if len(self.rows) > 1 else "regions"

    def condition(self, pipe: Any) -> None:
        """The regions' contexts from the text conditioner as it is now, and the plans over their rows."""
        device, conditioner = pipe._execution_device, pipe.text_conditioner
        zero_pads = _pads_are_zero(pipe.transformer)
        known: dict[str, tuple[torch.Tensor, int]] = {}  # by prompt: its rows and the number of its pads
        for prompt, text in self.texts.items():
            inputs = {name: value.to(device) for name, value in text.conditioner_inputs.items()}
            inputs["source_hidden_states"] = inputs["source_hidden_states"].to(conditioner.dtype)
            found = conditioner(**inputs)[0]
            tokens = text.tokens if zero_pads else found.shape[0]
            known[prompt] = found[:tokens], found.shape[0] - tokens
        self.contexts = tuple(tuple(known[region.prompt][0] for region in regions) for regions in self.rows)
        self.plans = tuple(
            self._plan(row, regions, [known[region.prompt] for region in regions]) if regions else None
            for row, regions in enumerate(self.rows)
        )

    def _plan(self, row: int, regions: Sequence[Region], known: Sequence[tuple[torch.Tensor, int]]) -> RegionPlan:
        ends = list(itertools.accumulate(len(context) for context, _ in known))
        try:
            return RegionPlan.from_masks(
                [region.mask for region in regions],
                list(zip([0, *ends[:-1]], ends, strict=True)),
                pad_counts=[pads for _, pads in known],
                region_strengths=[region.strength for region in regions],
                priorities=[region.priority for region in regions],
                **self.plan_keywords,
            )
        except (TypeError, ValueError) as error:
            pattern = rf"^({'|'.join(_FIELD_OF)})\[(\d+)\]"
            text_of = re.sub(pattern, lambda m: f"{self._name(row)}[{m[2]}].{_FIELD_OF[m[1]]}", str(error))
            raise type(error)(text_of) from error

    # ---------------------------------------------------------------------------------------------- installation

    def install(self, pipe: Any) -> None:
        transformer = pipe.transformer
        for index, block in enumerate(transformer.transformer_blocks):
            processor = _Processor(self, index in self.blocks, block.attn2.processor)
            self.processors.append((block.attn2, processor))
            block.attn2.set_processor(processor)
        self.hooks = [
            transformer.register_forward_pre_hook(self._before_transformer, with_kwargs=True),
            transformer.register_forward_hook(self._after_transformer, always_call=True),
            pipe.text_conditioner.register_forward_hook(self._after_conditioner),
        ]
        transformer._anima_fast = self

    def uninstall(self, transformer: Any) -> None:
        for hook in self.hooks:
            hook.remove()
        for attention, processor in self.processors:
            if attention.processor is processor:  # else someone else's has taken its place
                attention.set_processor(processor.original)
        del transformer._anima_fast

    def _after_conditioner(self, *_: Any) -> None:
        """The pipeline has conditioned its own prompt: again for the regions, with whatever LoRA is loaded now."""
        pipe = self.pipe()
        if self.conditioning or pipe is None or not self.texts:
            return
        self.conditioning = True
        try:
            with torch.no_grad():
                self.condition(pipe)
        finally:
            self.conditioning = False

    # ------------------------------------------------------------------------------------------------- the calls

    def _before_transformer(self, transformer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.current = None
        given = dict(zip(_parameters(type(transformer).forward), args, strict=False), **kwargs)
        latents, embeds = given.get("hidden_states"), given.get("encoder_hidden_states")
        pipe = self.pipe()
        if pipe is None or latents is None or not isinstance(embeds, torch.Tensor):
            return self.decline("the transformer was not called by the pipeline that was enabled")
        tiles = getattr(transformer, "_anima_fast_tiles", None)  # of runner.tiles
        if tiles is not None and tiles.box is None:
            return None  # the whole canvas: its tiles come one by one
        conditional = pipe.guider.is_conditional
        frames, height, width = (s // p for s, p in zip(latents.shape[2:], transformer.config.patch_size, strict=True))
        grid = (frames, height, width)
        box = _WHOLE if tiles is None else tiles.box
        call = self.calls.get((conditional, box))
        if call is None or call.embeds() is not embeds or call.grid != grid:
            shortest = pipe.text_conditioner.config.min_sequence_length
            self.calls = {
                key: other
                for key, other in self.calls.items()
                if other.embeds() is not None and (key[0] != conditional or other.embeds() is embeds)
            }
            call = self._prepare(transformer, embeds, grid, conditional, shortest, box)
            self.calls[conditional, box] = call
        regional = conditional and bool(self.texts)
        self.current = (call, regional, regional and self._in_window(pipe))
        return None

    def _after_transformer(self, *_: Any) -> None:
        self.current = None

    def decline(self, reason: str) -> None:
        if not self.declined[reason]:
            _log.warning("anima_fast leaves cross-attention to diffusers: %s", reason)
        self.declined[reason] += 1

    def _in_window(self, pipe: Any) -> bool:
        if self.window == (0.0, 1.0):
            return True
        scheduler = pipe.scheduler
        if self.sigmas is None or self.sigmas[0]() is not scheduler.sigmas:
            self.sigmas = weakref.ref(scheduler.sigmas), scheduler.sigmas.tolist()  # one copy to the host a run
        index = scheduler.begin_index or 0 if scheduler.step_index is None else scheduler.step_index
        sigma = self.sigmas[1][index]
        shift = getattr(scheduler, "shift", None) or scheduler.config.get("flow_shift") or 1.0
        first, last = (percent_to_sigma(percent, shift) for percent in self.window)
        return last - _SIGMA_TOLERANCE <= sigma <= first + _SIGMA_TOLERANCE

    def _prepare(
        self,
        transformer: Any,
        embeds: torch.Tensor,
        grid: tuple[int, int, int],
        conditional: bool,
        shortest: int,
        box: tuple[float, ...],
    ) -> _Call:
        """The context and the plan of each kind of call with these prompts, one a row of the batch, on a tile.

        `shortest` is what the conditioner pads a prompt to that comes alone.
        """
        count = embeds.shape[0]
        if count % len(self.rows):
            raise invalid("regions", f"{len(self.rows)} lists of regions for {count} prompts", "one for each prompt")
        tokens = _real_rows(embeds) if _pads_are_zero(transformer) else [embeds.shape[1]] * count
        prompts = embeds[:, : max(tokens)]
        # Among different prompts, a longer one adds no pads to the others.
        padded = shortest if len(self.rows) > 1 else embeds.shape[1]
        kinds = [(row * len(self.rows) // count, tokens[row]) for row in range(count)]
        different = dict.fromkeys(kinds)  # rows of one kind have one plan
        pads = self.plan_keywords.get("pads", "fold")
        own = {kind: RegionPlan.plain(kind[1], max(padded - kind[1], 0), pads=pads) for kind in different}
        plans = {"plain": own}
        contexts = {"plain": prompts}
        if conditional and self.texts:
            together = [
                torch.cat([*(part.to(embeds) for part in self.contexts[layout]), embeds[row, :length]])
                for row, (layout, length) in enumerate(kinds)
            ]
            contexts["regions"] = torch.nn.utils.rnn.pad_sequence(together, batch_first=True)
            plans["regions"] = {}
            for layout, length in different:
                plan = self.plans[layout]
                if plan is None:
                    plan = own[layout, length]
                elif self.base:
                    start = sum(len(context) for context in self.contexts[layout])
                    plan = self._with_base(plan, start, length, max(padded - length, 0))
                plans["regions"][layout, length] = plan
            if self.outside == "all":
                contexts["outside"] = contexts["regions"]
                plans["outside"] = {
                    kind: dataclasses.replace(plan, combine="logit", strength=0.0)
                    for kind, plan in plans["regions"].items()
                }
            else:
                contexts["outside"], plans["outside"] = prompts, own
        bound = {}
        for name, of_kind in plans.items():
            single = [plan.crop(box).bind(grid, device=embeds.device) for plan in of_kind.values()]
            index = [list(different).index(kind) for kind in kinds]
            bound[name] = single[0] if len(single) == 1 else BoundPlan.batch(single, index)
        alike = next((call for (of, _), call in self.calls.items() if of == conditional), None)
        return _Call(weakref.ref(embeds), grid, contexts if alike is None else alike.context, bound)

    @staticmethod
    def _with_base(plan: RegionPlan, start: int, tokens: int, pads: int) -> RegionPlan:
        return dataclasses.replace(plan, base_range=(start, start + tokens), base_pad_count=pads)


class _Processor:
    """Cross-attention of one block: to all prompts while regions act, else to those that it is told."""

    def __init__(self, state: _State, regional: bool, original: Any) -> None:
        self.state = state
        self.regional = regional
        self.original = original

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: torch.Tensor | None = None,
    ) -> torch.Tensor:
        state = self.state
        if state.current is not None:
            call, regional, active = state.current
            kind = "plain" if not regional else "regions" if active and self.regional else "outside"
            context = call.context[kind]
            q, k, v = (
                project(x).unflatten(2, (attn.heads, -1))
                for project, x in ((attn.to_q, hidden_states), (attn.to_k, context), (attn.to_v, context))
            )
            reason = None
            if attention_mask is not None or image_rotary_emb is not None:
                reason = "a mask or a rotary embedding on cross-attention"
            elif q.requires_grad or k.requires_grad or v.requires_grad:
                reason = "gradients are needed"
            if reason is None:
                out = regional_attention(
                    attn.norm_q(q), attn.norm_k(k), v, call.plan[kind], layout="bnhd", backend=state.backend
                )
                assert isinstance(out, torch.Tensor)
                state.served[kind] += 1
                return attn.to_out[1](attn.to_out[0](out.flatten(2)))
            state.decline(reason)
        return self.original(
            attn,
            hidden_states,
            encoder_hidden_states=encoder_hidden_states,
            attention_mask=attention_mask,
            image_rotary_emb=image_rotary_emb,
        )


@functools.cache
def _parameters(forward: Callable[..., Any]) -> tuple[str, ...]:
    """What a model's call takes, in order: by its class, since others may have wrapped the model's own `forward`."""
    return tuple(inspect.signature(forward).parameters)[1:]


def _real_rows(embeds: torch.Tensor) -> list[int]:
    """How many rows of each prompt come before the zero rows that pad it."""
    position = torch.arange(1, embeds.shape[1] + 1, device=embeds.device)
    return ((embeds != 0).any(dim=-1) * position).amax(dim=1).tolist()


def _pads_are_zero(transformer: Any) -> bool:
    """Whether a row of zeros has zero keys and values: true of Anima, and of every LoRA without a bias of its own."""
    return not any(
        name.endswith("bias")
        for block in transformer.transformer_blocks
        for layer in (block.attn2.to_k, block.attn2.to_v)
        for name, _ in layer.named_parameters()
    )


def _check_pipe(pipe: Any) -> None:
    if not all(hasattr(type(pipe), name) for name in ("load_components", "components")):
        raise wrong_type("pipe", pipe, "an AnimaModularPipeline of diffusers")
    missing = [name for name in _COMPONENTS if getattr(pipe, name, None) is None]
    if missing:
        raise invalid("pipe", f"{type(pipe).__name__} without {', '.join(missing)}", "one after pipe.load_components()")
    if not hasattr(pipe.guider, "is_conditional"):  # diffusers' tangential guidance fails to say
        raise invalid("pipe", f"the guider {type(pipe.guider).__name__}", "one that knows its conditional call")
    config = pipe.transformer.config
    name = type(pipe.transformer).__name__
    if name != "CosmosTransformer3DModel" or config.use_crossattn_projection or config.img_context_dim_in:
        raise invalid("pipe", f"a pipeline around {name}", "Anima's, a CosmosTransformer3DModel of text alone")


def _read_rows(regions: Any) -> tuple[tuple[Region, ...], ...]:
    if isinstance(regions, (list, tuple)) and regions and all(isinstance(row, (list, tuple)) for row in regions):
        several = len(regions) > 1
        return tuple(_read_regions(row, f"regions[{i}]" if several else "regions") for i, row in enumerate(regions))
    return (_read_regions(regions, "regions"),)


def _read_regions(regions: Any, called: str) -> tuple[Region, ...]:
    if isinstance(regions, (str, bytes, Mapping, Region)) or not isinstance(regions, Sequence):
        raise wrong_type(called, regions, "a sequence of Regions")
    found = []
    fields = [field.name for field in dataclasses.fields(Region)]
    for i, region in enumerate(regions):
        if isinstance(region, Mapping):
            for name in region:
                if name not in fields:
                    raise invalid(f"{called}[{i}]", f"the unknown key {name!r}", " | ".join(fields))
            for name in ("mask", "prompt"):
                if name not in region:
                    raise invalid(f"{called}[{i}].{name}", "nothing", "a value; it is required")
            region = Region(**region)
        if not isinstance(region, Region):
            raise wrong_type(f"{called}[{i}]", region, "a Region, or a mapping with its fields")
        if not isinstance(region.prompt, str):
            raise wrong_type(f"{called}[{i}].prompt", region.prompt, "a string")
        found.append(dataclasses.replace(region, mask=load_mask(region.mask, f"{called}[{i}].mask")))
    return tuple(found)


def _check_blocks(blocks: Iterable[int] | None, count: int) -> frozenset[int]:
    if blocks is None:
        return frozenset(range(count))
    allowed = f"whole numbers from {-count} to {count - 1}"
    if isinstance(blocks, (str, bytes)) or not isinstance(blocks, Iterable):
        raise wrong_type("blocks", blocks, allowed)
    numbers = list(blocks)
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, int) or not -count <= number < count:
            raise invalid("blocks", repr(number), allowed)
    return frozenset(number % count for number in numbers)
