"""Painting batches: one `Painter` a worker, whatever engine runs it. Pictures come back as bytes of PNG files."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..integrations.diffusers import Region, enable
from .encoder import replacements
from .jobs import Batch, Job
from .model import find, load, quiet
from .request import DTYPES, Request, generate, png

__all__ = ["Painted", "Painter", "paint"]


@dataclasses.dataclass(frozen=True)
class Painted:
    """What became of a batch: for each of its jobs, in order, the PNG or the reason why there is none."""

    number: int
    pictures: tuple[bytes | str, ...]
    seconds: float
    worker: str = ""
    jobs: tuple[Job, ...] = ()


class Painter:
    """Paints batches on one device and keeps the last model loaded.

    after_step  called with (steps done, steps of the batch)
    """

    def __init__(self, device: str, after_step: Callable[[int, int], None] = lambda done, total: None) -> None:
        self.device = device
        self.after_step = after_step
        self.pipe: Any = None
        self.model: str | None = None
        self.problem: str | None = None  # why the model could not be loaded

    def paint(self, batch: Batch) -> Painted:
        """Never raises for what is wrong with a job, a model or the memory: that is in the result."""
        started = time.perf_counter()
        requests = [job.request for job in batch.jobs]
        if self.model != batch.model:
            self.pipe, self.model, self.problem = None, batch.model, None
            try:
                self._load(requests[0])
            except Exception as error:  # whatever a file or a driver can do wrong
                self.problem = _reason(error)
        pictures: tuple[bytes | str, ...]
        if self.problem is not None:
            pictures = (self.problem,) * len(requests)
        else:
            pictures = tuple(self._paint(requests))
        return Painted(batch.number, pictures, time.perf_counter() - started)

    def _load(self, request: Request) -> None:
        dtype = DTYPES[request.dtype]
        components: dict[str, Any] = {}
        if request.encoder is not None:
            encoder, _ = request.encoder.load(device=self.device, dtype=dtype)
            components = replacements(encoder, dtype)
        self.pipe = load(
            find(request.model),
            dtype=dtype,
            device=self.device,
            after_step=lambda done, total, state: self.after_step(done, total),
            components=components,
        )

    def _paint(self, requests: Sequence[Request]) -> list[bytes | str]:
        try:
            with quiet():
                images = paint(self.pipe, requests)
        except Exception as error:  # one job's fault must not be the others'
            if len(requests) > 1:
                return [picture for request in requests for picture in self._paint([request])]
            return [_reason(error)]
        return [image if isinstance(image, str) else png(image, r) for image, r in zip(images, requests, strict=True)]


def paint(pipe: Any, requests: Sequence[Request]) -> list[Any]:
    """One picture (PIL) for each request, or the reason why not, all in one launch.

    The requests differ in prompts, regions and seed only (`jobs.group`). A row is, up to rounding, what `generate`
    gives for its request alone: noise from its own generator, texts padded as if they came alone.
    """
    if len(requests) == 1:
        return list(generate(pipe, requests[0])[0])
    first = requests[0]
    pipe.scheduler.set_shift(pipe.scheduler.config.shift if first.shift is None else first.shift)
    pipe.update_components(guider=pipe.guider.new(guidance_scale=first.guidance))
    width, height = first.size
    arguments: dict[str, Any] = {}
    if first.image is not None:
        from PIL import ImageOps

        image = ImageOps.exif_transpose(first.image.image("image")).convert("RGB")
        arguments = {"image": image, "strength": first.strength}
    rows = [
        [Region(region.mask.image("mask"), region.prompt, region.strength, region.priority) for region in r.regions]
        for r in requests
    ]
    with enable(
        pipe,
        rows,
        start_percent=first.start,
        end_percent=first.end,
        outside=first.outside,
        base=first.base,
        **first.plan,
    ):
        found = pipe(
            prompt=[request.prompt for request in requests],
            negative_prompt=[request.negative for request in requests],
            width=width,
            height=height,
            num_inference_steps=first.steps,
            generator=[torch.Generator().manual_seed(request.seed) for request in requests],
            output_type="pt",
            output="images",
            **arguments,
        )
    processor = pipe.image_processor
    finite = torch.isfinite(found).flatten(1).all(dim=1).tolist()
    images = processor.numpy_to_pil(processor.pt_to_numpy(found.nan_to_num()))
    return [
        image if good else f"the model gave NaN in {first.dtype}" for image, good in zip(images, finite, strict=True)
    ]


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    return (text if isinstance(error, (ValueError, FloatingPointError, FileNotFoundError)) and text else
            f"{type(error).__name__}: {text}").replace("--", "")  # fmt: skip
