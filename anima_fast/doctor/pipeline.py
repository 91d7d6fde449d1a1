"""The decision tree on a diffusers pipeline: the same tests, as changes of one request (`anima_fast.runner.request`).

    request = request_of(case, model="DIR")      from a workflow, as far as diffusers can do what it says
    run = pipeline.run(pipe, request)            rows, verdict and pictures as of `live.run`

What ComfyUI has and diffusers has not is said in the rows: only Euler's method samples a flow here, and a model is one
directory, so "files" is the baseline.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import io
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch

from ..dispatch import use_backend
from ..errors import invalid
from ..integrations.diffusers import PLAN_KEYWORDS
from ..runner.request import DTYPES, Embedded, Request, RequestRegion, generate
from . import measure
from .ablations import Ablation, Official
from .case import Case
from .live import Run, Tell, collect
from .passes import sampling
from .server import Progress
from .verdict import TESTS, Row
from .workflow import Link, Workflow

__all__ = ["DTYPES", "request_of", "run"]

#: As in `ablations`: enough for every window of steps.
_SHAPE_STEPS = 6

_Change = Callable[[Request], Request]


def run(
    pipe: Any, request: Request, *, official: Official | None = None, everything: bool = False, tell: Tell | None = None
) -> Run:
    """Run the tests of a request on a loaded pipeline (`runner.model.load`).

    Args:
        official: the baseline's numbers and prompt; a model of another size or vocabulary needs its own.
        everything: also the tests that the tree does not need for its verdict.
    """
    official = official or Official()
    request = dataclasses.replace(request, batch=1)
    planned = _plan(request, official, float(pipe.scheduler.config.shift))
    ablations = {
        test: Ablation(test, None if one.request is None else {}, one.changes, one.why, one.same_as)
        for test, one in planned.items()
    }

    def execute(test: str, number: int, count: int) -> tuple[Row, bytes | None]:
        if tell:
            tell(test, number, count, Progress(node="pipeline"))
        return _execute(pipe, test, planned[test])

    return collect(execute, ablations, _environment(pipe, request), official, everything)


@dataclasses.dataclass(frozen=True)
class WorkflowRequest(Request):
    """What a workflow asks for. Its sampling patch tells the model `multiplier` times the noise level; right is 1, a
    node made for another model has 1000."""

    multiplier: float = 1.0


@dataclasses.dataclass(frozen=True)
class _Test:
    request: Request | None
    changes: tuple[str, ...] = ()
    why: str | None = None
    same_as: str | None = None
    plain_attention: bool = False


def _plan(request: Request, o: Official, model_shift: float) -> dict[str, _Test]:
    shift = model_shift if request.shift is None else request.shift
    baseline = Request(
        prompt=o.text,
        negative=o.negative,
        size=o.size,
        seed=request.seed,
        steps=o.steps,
        guidance=o.cfg,
        dtype=request.dtype,
        model=request.model,
    )

    def off(r: Request) -> Request:
        return dataclasses.replace(r, regions=(), plan={})

    def shifted(r: Request) -> Request:
        if isinstance(r, WorkflowRequest):
            r = dataclasses.replace(r, multiplier=1.0)
        return r if shift == o.shift else dataclasses.replace(r, shift=o.shift)

    def settings(r: Request) -> Request:
        return dataclasses.replace(r, steps=o.steps, guidance=o.cfg)

    def resolution(r: Request) -> Request:
        near = 0.85 <= r.size[0] * r.size[1] / (o.size[0] * o.size[1]) <= 1.2
        return r if near or r.image is not None else dataclasses.replace(r, size=o.size)

    def zero(r: Request) -> Request:
        return dataclasses.replace(r, plan={**r.plan, "strength": 0.0}) if r.regions else r

    def shapes(r: Request) -> Request:
        return dataclasses.replace(r, steps=min(r.steps, _SHAPE_STEPS)) if r.regions else r

    def test(why: str, same_as: str | None, *steps: _Change, base: tuple[_Change, ...] = ()) -> _Test:
        before = request
        for step in base:
            before = step(before)
        after = before
        for step in steps:
            after = step(after)
        if after == before:
            return _Test(None, why=why, same_as=same_as)
        return _Test(after, tuple(_changes(request, after)))

    three = (shifted, settings, resolution)
    none = "there are no regions"
    exchanged = ("plain PyTorch for the regions' attention, diffusers' native attention elsewhere",)
    size = "{} x {} already".format(*request.size) if request.image is None else "the latent is made from a picture"
    found = {
        "baseline": _Test(baseline),
        "files": _Test(None, why="the model is one directory", same_as="baseline"),
        "workflow": _Test(request),
        "first_pass": _Test(None, why="there is one pass", same_as="workflow"),
        "regions_off": test(none, "first_pass", off),
        "zero_strength": test(none, None, zero),
        "sampling": test(f"the shift is {shift:g}", "regions_off", shifted, base=(off,)),
        "sampler": test("steps and guidance are the official ones", "regions_off", settings, base=(off,)),
        "resolution": test(size, "regions_off", resolution, base=(off,)),
        "matched": test("nothing to change", "regions_off", *three, base=(off,)),
        "shapes": test(none if not request.regions else "it has few steps", None, shapes),
        "attention_off": _Test(None, why=none, same_as="first_pass"),
        "plain": _Test(None, why="only the regions' attention can be exchanged here", same_as="matched"),
    }
    if request.regions:
        found["attention_off"] = _Test(request, exchanged, plain_attention=True)
        if found["shapes"].request is None:
            found["shapes"] = _Test(request)
    return {name: found[name] for name in TESTS}


def _changes(before: Request, after: Request) -> Iterator[str]:
    if before.regions and not after.regions:
        yield "regions: left out"
    if _multiplier(before) != _multiplier(after):
        yield f"the model sees the noise level times: {_multiplier(before):g} -> {_multiplier(after):g}"
    for name in ("size", "steps", "guidance", "shift"):
        old, new = getattr(before, name), getattr(after, name)
        if old != new:
            yield f"{name}: {_said(old)} -> {_said(new)}"
    if after.regions and before.plan != after.plan:
        yield f"plan: {before.plan} -> {after.plan}"


def _said(value: Any) -> str:
    if isinstance(value, tuple):
        return " x ".join(map(str, value))
    return "the model's" if value is None else f"{value:g}"


def _execute(pipe: Any, test: str, one: _Test) -> tuple[Row, bytes | None]:
    if one.request is None:
        return Row(test, "skipped", why=one.why, same_as=one.same_as, changes=one.changes), None
    started = time.perf_counter()
    width, height = one.request.size
    try:
        plain = _plain_attention(pipe) if one.plain_attention else contextlib.nullcontext()
        with plain, _multiplied(pipe, _multiplier(one.request)):
            images, enabled = generate(pipe, one.request)
    except FloatingPointError:
        numbers = measure.measure(np.full((3, height, width), np.nan))
        return Row(test, "measured", numbers, why="the model gave NaN", changes=one.changes), None
    except (ValueError, TypeError, RuntimeError) as error:
        return Row(test, "failed", why=" ".join(str(error).split()), changes=one.changes), None
    seconds = time.perf_counter() - started
    buffer = io.BytesIO()
    images[0].save(buffer, "PNG")
    log = [f"cross-attention calls: {dict(enabled.served)}, tokens {width // 16} x {height // 16}"]
    log += [f"left to diffusers: {reason} ({count} calls)" for reason, count in enabled.declined.items()]
    try:
        numbers = measure.measure(measure.decode(buffer.getvalue()))
    except ValueError as error:
        return Row(test, "failed", why=str(error), changes=one.changes, seconds=seconds), None
    row = Row(test, "measured", numbers, changes=one.changes, seconds=seconds, log=tuple(log))
    return row, buffer.getvalue()


def _multiplier(request: Request) -> float:
    return request.multiplier if isinstance(request, WorkflowRequest) else 1.0


@contextlib.contextmanager
def _multiplied(pipe: Any, multiplier: float) -> Iterator[None]:
    """The transformer is told the noise level times `multiplier`."""

    def tell(_: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "timestep": kwargs["timestep"] * multiplier}

    hook = pipe.transformer.register_forward_pre_hook(tell, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


@contextlib.contextmanager
def _plain_attention(pipe: Any) -> Iterator[None]:
    transformer = pipe.transformer
    with use_backend("torch"):
        transformer.set_attention_backend("native")
        try:
            yield
        finally:
            transformer.reset_attention_backend()


def _environment(pipe: Any, request: Request) -> dict[str, Any]:
    diffusers = importlib.import_module("diffusers")
    device = next(pipe.transformer.parameters()).device
    facts = {
        "diffusers": diffusers.__version__,
        "torch": torch.__version__,
        "CUDA": torch.version.cuda or "none",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "dtype": str(next(pipe.transformer.parameters()).dtype),
        "scheduler": f"{type(pipe.scheduler).__name__}, shift {pipe.scheduler.config.shift:g}",
    }
    return {"address": request.model, "facts": facts, "unknown": {}}


# ---- from a workflow


def request_of(case: Case, model: str, dtype: str = "fp32") -> tuple[WorkflowRequest, list[str]]:
    """A workflow's first pass as a request, and what of it diffusers cannot do or nobody can know.

    Raises ValueError if the prompt, a region's mask or the size cannot be read off it.
    """
    workflow, notes = case.workflow, list[str]()
    first = next((one for one in case.passes if not one.later), None)
    if first is None:
        raise invalid("workflow", "no sampler", "one that can be understood without running it")
    if not first.size.known:
        raise invalid("workflow", "a size that is computed when it runs", "widths and heights as numbers")
    if first.size.start != "empty":
        notes.append("it starts from a picture; here, from noise")
    name, scheduler = first.get("sampler_name"), first.get("scheduler")
    if name != "euler" or scheduler != "simple":
        notes.append(f"sampler {name}, scheduler {scheduler}; here euler on the model's own schedule")
    found = sampling(workflow, first.path)
    shift = float(found.shift) if found.kind == "flow" and isinstance(found.shift, (int, float)) else None
    if shift is None:
        notes.append("its sampling patch cannot be had here; the model's own shift")
    regions, plan, start, end = [], dict[str, Any](), 0.0, 1.0
    positive, negative = first.positive, first.negative
    if case.regions:
        if len(case.regions) > 1:
            notes.append("several regional nodes; the first counts")
        one = case.regions[0]
        for region in one.regions:
            if region.mask is None:
                raise invalid(
                    "workflow", f"a mask of {region.name} that is made when it runs", "masks that can be read"
                )
            strength = region.strength if isinstance(region.strength, (int, float)) else 1.0
            text = _text(workflow, region.prompt_link, region.name)
            regions.append(RequestRegion(_mask_file(region.name, region.mask), text, float(strength)))
        values = {keyword: workflow.value(one.settings.id, keyword, None) for keyword in PLAN_KEYWORDS}
        plan = {k: v for k, v in values.items() if isinstance(v, (str, int, float))}
        if plan.get("mode") != "hard" or plan.get("hard_value") == 0:  # nodes have it in every mode, 0 for none
            plan.pop("hard_value", None)
        start, end = (workflow.value(one.node.id, f"{n}_percent", d) for n, d in (("start", 0.0), ("end", 1.0)))
        positive = one.base
        negative = workflow.nodes[one.node.id].inputs.get("negative") or negative
    shape = tuple(max(16, round(n / 16) * 16) for n in (first.size.width, first.size.height))
    steps, cfg = first.get("steps"), first.get("cfg")
    seed = next((first.get(n) for n in ("seed", "noise_seed") if isinstance(first.get(n), int)), 0)
    return (
        WorkflowRequest(
            prompt=_text(workflow, positive, "the prompt") if positive is not None else "",
            negative=_text(workflow, negative, "the negative prompt") if isinstance(negative, Link) else "",
            regions=tuple(regions),
            size=(shape[0], shape[1]),
            seed=int(seed),
            steps=int(steps) if isinstance(steps, (int, float)) else 30,
            guidance=float(cfg) if isinstance(cfg, (int, float)) else 4.0,
            shift=shift,
            multiplier=found.multiplier,
            start=float(start) if isinstance(start, (int, float)) else 0.0,
            end=float(end) if isinstance(end, (int, float)) else 1.0,
            base=positive is not None or not regions,
            plan=plan,
            dtype=dtype,
            model=model,
        ),
        notes,
    )


def _text(workflow: Workflow, link: Link | None, what: str) -> str:
    """The text at the beginning of a conditioning."""
    for _ in range(len(workflow.nodes) + 1):
        found = workflow.follow(link)
        if found is None:
            break
        text = workflow.value(found.node, "text", None)
        if isinstance(text, str):
            return text
        inputs: Mapping[str, Any] = workflow.nodes[found.node].inputs
        link = next((v for n, v in inputs.items() if isinstance(v, Link) and n in ("conditioning", "positive")), None)
    raise invalid("workflow", f"{what} that is no text in it", "CLIP Text Encode nodes with their text")


def _mask_file(name: str, mask: Any) -> Embedded:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray((np.clip(np.asarray(mask), 0, 1) * 255).round().astype(np.uint8)).save(buffer, "PNG")
    return Embedded(f"{name}.png", buffer.getvalue())
