"""Putting hooks on ComfyUI's models. ComfyUI is imported inside the functions, when it is there."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from ...bound_plan import BoundPlan
from ...errors import invalid
from .hook import KEY, ModelHook, log
from .regions import Region, Settings
from .steps import PlanHook

__all__ = ["OLDEST", "accelerate", "apply_plan", "apply_regions", "parse_blocks", "require_comfyui"]

#: Anima's `attn2_patch` and `block_index`, which tell cross- from self-attention, came with this version.
OLDEST = (0, 29)


def require_comfyui(version: str) -> None:
    """Raises RuntimeError for a ComfyUI that is too old."""
    found = tuple(int(n) for n in re.findall(r"\d+", version)[:2])
    if found < OLDEST:
        raise RuntimeError(
            f"anima_fast: this is ComfyUI {version}; its nodes need {'.'.join(map(str, OLDEST))} or newer, where Anima "
            "tells cross-attention from self-attention. Update ComfyUI"
        )


def apply_regions(model: Any, regions: Sequence[Region], settings: Settings | None = None) -> Any:
    """A clone of a MODEL whose conditional rows see the regions; the positive prompt is the base prompt.

    Raises TypeError or ValueError that names the input and says what to change.

    Example:
        >>> left = Region.make(conditioning, mask, strength=1.0)
        >>> model = apply_regions(model, [left, right], Settings(combine="blend", strength=1.0))
    """
    settings = settings or Settings()
    settings.check(regions)
    diffusion = _diffusion_model(model)
    width = _text_width(diffusion)
    for region in regions:
        if region.prompt is None:
            raise invalid(region.name, "no conditioning", "a CONDITIONING for every region")
        channels = region.prompt.embeds.shape[2]
        if width is not None and channels != width:
            raise invalid(
                f"{region.name}: conditioning",
                f"text of {channels} channels",
                f"{width}, as Anima's own text encoder gives (Load CLIP with qwen_3_06b_base)",
            )
    blocks = len(diffusion.blocks)
    if settings.blocks is not None and not settings.blocks <= set(range(blocks)):
        raise invalid("blocks", str(sorted(settings.blocks)), f"numbers from 0 to {blocks - 1}, as this model has")
    window = settings.window(model.get_model_object("model_sampling").percent_to_sigma)
    return _with_hook(model, ModelHook(regions, settings, window, "Anima Regions"))


def accelerate(model: Any, debug: bool = False) -> Any:
    """A clone of a MODEL whose cross-attention folds each prompt's pads: the same picture, fewer keys.

    On a model that already has regions, whose pads are folded, it changes nothing.
    """
    _diffusion_model(model)
    from comfy.patcher_extension import WrappersMP

    if model.get_wrappers(WrappersMP.DIFFUSION_MODEL, KEY):
        log.info("Anima Accelerate: the model already has Anima Regions or Accelerate, which does the same.")
        return model.clone()
    return _with_hook(model, ModelHook(settings=Settings(debug=debug)))


def apply_plan(model: Any, plan: BoundPlan, start_percent: float = 0.0, end_percent: float = 1.0) -> Any:
    """A clone of a MODEL whose conditional rows attend to an already concatenated conditioning by `plan`."""
    _diffusion_model(model)
    settings = Settings(start_percent=start_percent, end_percent=end_percent)
    window = settings.window(model.get_model_object("model_sampling").percent_to_sigma)
    return _with_hook(model, PlanHook(plan, window))


def parse_blocks(text: str) -> frozenset[int] | None:
    """ "0-3, 7" -> {0, 1, 2, 3, 7}; empty: None, all blocks."""
    if not text.strip():
        return None
    found: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,3})\s*(?:-\s*(\d{1,3})\s*)?", part)
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise invalid("blocks", repr(text), "numbers and ranges such as 0-13, 20; empty for all blocks")
        found.update(range(int(match[1]), int(match[2] or match[1]) + 1))
    return frozenset(found)


def _diffusion_model(model: Any) -> Any:
    found = getattr(getattr(model, "model", None), "diffusion_model", None)
    if not hasattr(found, "preprocess_text_embeds") or not hasattr(found, "blocks"):
        name = type(getattr(model, "model", model)).__name__
        raise invalid("model", f"a model of class {name}", "an Anima model (Load Diffusion Model with an Anima file)")
    return found


def _text_width(diffusion: Any) -> int | None:
    attention = getattr(diffusion.blocks[0], "cross_attn", None)
    return getattr(attention, "context_dim", None)


def _with_hook(model: Any, hook: ModelHook) -> Any:
    from comfy.patcher_extension import CallbacksMP, WrappersMP
    from comfyui_version import __version__ as version

    require_comfyui(version)
    patched = model.clone()
    if patched.get_wrappers(WrappersMP.DIFFUSION_MODEL, KEY):
        log.info("%s: replaces what an earlier Anima Regions or Accelerate put on this model.", hook.title)
        patched.remove_wrappers_with_key(WrappersMP.DIFFUSION_MODEL, KEY)
        patched.remove_callbacks_with_key(CallbacksMP.ON_CLEANUP, KEY)
    patched.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, KEY, hook.wrapper)
    patched.add_callback_with_key(CallbacksMP.ON_CLEANUP, KEY, hook.cleanup)
    return patched
