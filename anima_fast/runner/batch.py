"""Painting batches: one `Painter` a worker, whatever engine runs it. Pictures come back as bytes of PNG files."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .encoder import EncoderChoice, check_width, replacements
from .jobs import Batch, Job, one_line
from .model import find, load, quiet
from .request import DTYPES, Request, generate, png, settings

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
        self.encoder: EncoderChoice | None = None  # the model's, with the sums of its files
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
            pictures = tuple(self._paint([dataclasses.replace(r, encoder=self.encoder) for r in requests]))
        return Painted(batch.number, pictures, time.perf_counter() - started)

    def _load(self, request: Request) -> None:
        dtype = DTYPES[request.dtype]
        components: dict[str, Any] = {}
        self.encoder = None
        if request.encoder is not None:
            encoder, self.encoder = request.encoder.load(device=self.device, dtype=dtype)
            components = replacements(encoder, dtype)
        self.pipe = load(
            find(request.model),
            dtype=dtype,
            device=self.device,
            after_step=lambda done, total, state: self.after_step(done, total),
            components=components,
        )
        if request.encoder is not None:
            check_width(self.pipe, encoder)

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
    gives for its request alone: noise from its own generator, texts padded as if they came alone. Large pictures are
    launches of their own.
    """
    first = requests[0]
    if len(requests) == 1 or first.large:
        return [generate(pipe, request)[0][0] for request in requests]
    width, height = first.size
    arguments: dict[str, Any] = {}
    if first.image is not None:
        arguments = {"image": first.image.upright("--image"), "strength": first.strength}
    with settings(pipe, requests):
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
    text = one_line(error)
    clear = text and isinstance(error, (ValueError, FloatingPointError, FileNotFoundError))
    return text if clear else f"{type(error).__name__}: {text}"
