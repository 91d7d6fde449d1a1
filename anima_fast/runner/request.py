"""One request for pictures: what is asked for, the pictures, and the record of it that goes into each PNG.

The record is JSON in the PNG's text chunk `anima_fast`. It holds the masks and the image themselves, so that a picture
can be made again from its file alone.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import inspect
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..errors import invalid, wrong_type
from ..files import write_atomic
from ..integrations.diffusers import PLAN_KEYWORDS, Enabled, Region, enable
from ..masks import MAX_MASK_PIXELS, load_mask
from ..plan import RegionPlan
from .encoder import EncoderChoice
from .model import DEFAULT_MODEL

__all__ = ["CHUNK", "DTYPES", "Embedded", "Request", "RequestRegion", "generate", "preview", "read_record", "write_png"]

CHUNK = "anima_fast"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

#: Pixels a token covers; diffusers takes no other sizes.
TOKEN = 16

_LARGEST_SEED = 2**63 - 1


@dataclasses.dataclass(frozen=True)
class Embedded:
    """A file's name and bytes."""

    name: str
    data: bytes = dataclasses.field(repr=False)

    @classmethod
    def read(cls, path: str, option: str) -> Embedded:
        if not Path(path).is_file():
            raise FileNotFoundError(f"{option}: no file {path!r}")
        return cls(Path(path).name, Path(path).read_bytes())

    def image(self, option: str) -> Any:
        """The decoded PIL image. Raises ValueError that calls it by `option`."""
        from PIL import Image, UnidentifiedImageError

        try:
            image = Image.open(io.BytesIO(self.data))
            if image.width * image.height > MAX_MASK_PIXELS:
                raise invalid(option, f"{image.width} x {image.height} pixels", f"at most {MAX_MASK_PIXELS} pixels")
            image.load()
            return image
        except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, EOFError) as error:
            raise invalid(option, f"{self.name!r}, which cannot be read ({error})", "a whole image file") from error


@dataclasses.dataclass(frozen=True)
class RequestRegion:
    mask: Embedded
    prompt: str
    strength: float = 1.0
    priority: float = 0.0


@dataclasses.dataclass(frozen=True)
class Request:
    """Everything that decides what a picture looks like, but for the machine."""

    prompt: str
    negative: str = ""
    regions: tuple[RequestRegion, ...] = ()
    size: tuple[int, int] = (1024, 1024)
    seed: int = 0
    steps: int = 30
    guidance: float = 4.0
    shift: float | None = None  # None: the model's
    batch: int = 1
    image: Embedded | None = None
    strength: float = 0.6
    start: float = 0.0
    end: float = 1.0
    outside: str = "all"
    base: bool = True
    plan: dict[str, Any] = dataclasses.field(default_factory=dict)
    dtype: str = "fp32"
    model: str = DEFAULT_MODEL
    encoder: EncoderChoice | None = None  # None: the model's own

    def check(self) -> None:
        """Raises what can be said without the model. Errors name the command's options."""
        if any(n % TOKEN for n in self.size):
            nearest = "x".join(str(max(TOKEN, round(n / TOKEN) * TOKEN)) for n in self.size)
            raise invalid("--size", "{}x{}".format(*self.size), f"multiples of {TOKEN}, such as {nearest}")
        for name, value, low, high in (
            ("--seed", self.seed, 0, _LARGEST_SEED - self.batch + 1),
            ("--steps", self.steps, 1, 10000),
            ("--batch", self.batch, 1, 4096),
        ):
            if not low <= value <= high:
                raise invalid(name, f"{value}", f"a whole number from {low} to {high}")
        if not (math.isfinite(self.guidance) and self.guidance >= 0):
            raise invalid("--guidance", f"{self.guidance}", "a number >= 0; 1 is without a negative prompt")
        if self.shift is not None and not (math.isfinite(self.shift) and self.shift > 0):
            raise invalid("--shift", f"{self.shift}", "a number above 0; Anima's own is 3")
        if not 0 < self.strength <= 1:
            raise invalid("--strength", f"{self.strength}", "above 0 and at most 1")
        if self.image is not None and int(self.steps * self.strength) < 1:
            raise invalid("--strength", f"{self.strength} of {self.steps} steps", "at least one step's worth")
        if not 0 <= self.start <= self.end <= 1:
            raise invalid("--start, --end", f"{self.start:g} and {self.end:g}", "0 <= start <= end <= 1")
        for name in self.plan:
            if name not in PLAN_KEYWORDS:
                raise invalid("--plan", f"the unknown {name!r}", " | ".join(PLAN_KEYWORDS))
        if self.image is not None:
            self.image.image("--image")
        count = len(self.regions)
        ranges = [(i, i + 1) for i in range(count + 1)]
        masks = [load_mask(r.mask.image(f"--region {r.mask.name}"), f"--region {r.mask.name}") for r in self.regions]
        try:
            RegionPlan.from_masks(
                masks,
                ranges[:count],
                base_range=ranges[count],
                region_strengths=[region.strength for region in self.regions],
                priorities=[region.priority for region in self.regions],
                **self.plan,
            )
        except (TypeError, ValueError) as error:
            text = (
                str(error).replace("region_strengths", "--region-strength").replace("priorities", "--region-priority")
            )
            raise type(error)(text if text.startswith("--") else f"--plan: {text}") from error

    def to_json(self) -> dict[str, Any]:
        """The record; files as base64."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        fields["regions"] = [{**dataclasses.asdict(region), "mask": _pack(region.mask)} for region in self.regions]
        fields["image"] = None if self.image is None else _pack(self.image)
        fields["encoder"] = None if self.encoder is None else dataclasses.asdict(self.encoder)
        return {"anima_fast": __version__, **fields}

    @classmethod
    def from_json(cls, record: Any) -> Request:
        """Raises ValueError or TypeError naming the field that does not fit."""
        if not isinstance(record, dict):
            raise wrong_type("record", record, "an object")
        fields = {name: value for name, value in record.items() if name != "anima_fast"}
        known = {field.name: field for field in dataclasses.fields(cls)}
        for name, value in fields.items():
            if name not in known:
                raise invalid(
                    "record", f"the unknown {name!r}", "a record of this version of anima_fast, or an older one"
                )
            if name in _KINDS and not isinstance(value, _KINDS[name]):
                raise invalid(f"record: {name}", f"{type(value).__name__}", _KINDS[name].__name__)
        try:
            regions = tuple(RequestRegion(**{**r, "mask": _unpack(r["mask"])}) for r in fields.get("regions", ()))
            image = fields.get("image")
            width, height = fields.get("size", (1024, 1024))
            encoder = fields.get("encoder")
            packed = dict(image=image and _unpack(image), encoder=encoder and EncoderChoice(**encoder))
            return cls(**fields | packed | dict(regions=regions, size=(int(width), int(height))))
        except (KeyError, TypeError, ValueError) as error:
            raise invalid("record", f"one that does not fit ({error})", "what anima-fast generate wrote") from error


_KINDS: dict[str, type] = {
    "prompt": str, "negative": str, "seed": int, "steps": int, "batch": int, "plan": dict, "model": str, "dtype": str,
}  # fmt: skip


def _pack(file: Embedded) -> dict[str, str]:
    return {"name": file.name, "data": base64.b64encode(file.data).decode()}


def _unpack(packed: dict[str, str]) -> Embedded:
    try:
        return Embedded(packed["name"], base64.b64decode(packed["data"], validate=True))
    except binascii.Error as error:
        raise ValueError(f"{packed['name']!r} is damaged") from error


def generate(pipe: Any, request: Request) -> tuple[list[Any], Enabled]:
    """The request's pictures (PIL), and what its regions did. Picture i is drawn from seed + i.

    Raises FloatingPointError when the model gives NaN.
    """
    pipe.scheduler.set_shift(pipe.scheduler.config.shift if request.shift is None else request.shift)
    pipe.update_components(guider=pipe.guider.new(guidance_scale=request.guidance))
    width, height = request.size
    arguments: dict[str, Any] = {}
    if request.image is not None:
        from PIL import ImageOps

        image = ImageOps.exif_transpose(request.image.image("--image")).convert("RGB")
        arguments = {"image": image, "strength": request.strength}
    regions = [
        Region(region.mask.image("--region"), region.prompt, region.strength, region.priority)
        for region in request.regions
    ]
    generators = [torch.Generator().manual_seed(request.seed + i) for i in range(request.batch)]
    with enable(
        pipe,
        regions,
        start_percent=request.start,
        end_percent=request.end,
        outside=request.outside,
        base=request.base,
        **request.plan,
    ) as enabled:
        found = pipe(
            prompt=request.prompt,
            negative_prompt=request.negative,
            width=width,
            height=height,
            num_inference_steps=request.steps,
            num_images_per_prompt=request.batch,
            generator=generators if request.batch > 1 else generators[0],
            output_type="pt",
            output="images",
            **arguments,
        )
    if not bool(torch.isfinite(found).all()):
        raise FloatingPointError(f"the model gave NaN in {request.dtype}")
    processor = pipe.image_processor
    return processor.numpy_to_pil(processor.pt_to_numpy(found)), enabled


@torch.no_grad()
def preview(pipe: Any, block_state: Any) -> Any:
    """The first picture of a running loop as the model sees it now, without its noise (PIL)."""
    scheduler, vae = pipe.scheduler, pipe.vae
    sigma = scheduler.sigmas[scheduler.step_index]
    clean = (block_state.latents[:1] - sigma * block_state.noise_pred[:1]).to(vae.dtype)
    mean, std = (
        torch.tensor(values).view(1, -1, 1, 1, 1).to(clean)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    decoded = vae.decode(clean * std + mean, return_dict=False)[0][:, :, 0]
    return pipe.image_processor.postprocess(decoded, output_type="pil")[0]


def write_png(image: Any, path: Path, request: Request | None = None) -> None:
    """A PNG with the request's record, whole or not at all."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    if request is not None:
        info.add_text(CHUNK, json.dumps(request.to_json()))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=info)
    write_atomic(path, buffer.getvalue())


def read_record(path: str) -> Request:
    """The request behind a PNG that `write_png` wrote."""
    from PIL import Image, UnidentifiedImageError

    if not Path(path).is_file():
        raise FileNotFoundError(f"--like: no file {path!r}")
    try:
        with Image.open(path) as image:
            text = getattr(image, "text", {}).get(CHUNK)
        if text is None:
            raise invalid("--like", f"{path!r}, without a record", "a PNG as anima-fast generate wrote it")
        return Request.from_json(json.loads(text))
    except (UnidentifiedImageError, OSError, SyntaxError, json.JSONDecodeError) as error:
        raise invalid("--like", f"{path!r}, which cannot be read ({error})", "a whole PNG file") from error
    except (ValueError, TypeError) as error:
        text = str(error)
        raise type(error)(text if text.startswith("--like") else f"--like: {text}") from error


def plan_value(name: str, text: str) -> Any:
    """The value of a `--plan NAME=TEXT`, of the type that `RegionPlan.from_masks` takes."""
    if name not in PLAN_KEYWORDS:
        raise invalid("--plan", f"the unknown {name!r}", " | ".join(PLAN_KEYWORDS))
    default = inspect.signature(RegionPlan.from_masks).parameters[name].default
    if isinstance(default, bool):
        if text.lower() not in ("true", "false"):
            raise invalid(f"--plan: {name}", repr(text), "true | false")
        return text.lower() == "true"
    if isinstance(default, str):
        return text
    try:
        return float(text)
    except ValueError as error:
        raise invalid(f"--plan: {name}", repr(text), "a number") from error


def stretched(masks: Sequence[RequestRegion], size: tuple[int, int]) -> list[str]:
    """Names of the masks whose shape is not the picture's."""
    found = []
    for region in masks:
        width, height = region.mask.image("--region").size
        if not 0.98 <= (width / height) / (size[0] / size[1]) <= 1.02:
            found.append(f"the mask {region.mask.name} is {width} x {height} and is stretched to {size[0]} x {size[1]}")
    return found
