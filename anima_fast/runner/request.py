"""One request for pictures: what is asked for, the pictures, and the record of it that goes into each PNG.

The record is JSON in the PNG's text chunk `anima_fast`. It holds the masks and the image themselves, so that a picture
can be made again from its file alone.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import dataclasses
import inspect
import io
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..errors import invalid, wrong_type
from ..files import write_atomic
from ..integrations.diffusers import PLAN_KEYWORDS, Enabled, Region, enable
from ..masks import MAX_MASK_PIXELS, load_mask
from ..plan import RegionPlan
from .chunks import chunked
from .encoder import EncoderChoice
from .model import DEFAULT_MODEL
from .tiles import TOKEN, check_tile, decode, encode, latents_only, tiled

__all__ = [
    "CHUNK",
    "DTYPES",
    "TOKEN",
    "Embedded",
    "Request",
    "RequestRegion",
    "generate",
    "png",
    "preview",
    "read_record",
    "settings",
    "write_png",
]

CHUNK = "anima_fast"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

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

    def upright(self, option: str) -> Any:
        """The decoded image as its camera held it (PIL, RGB). Raises what `image` raises."""
        from PIL import ImageOps

        return ImageOps.exif_transpose(self.image(option)).convert("RGB")

    def size(self, option: str) -> tuple[int, int]:
        """(width, height) of a picture that starts from it: its own, in whole tokens. Raises what `image` raises."""
        width, height = (max(TOKEN, side // TOKEN * TOKEN) for side in self.upright(option).size)
        return width, height


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
    hires: float | None = None  # None: one pass
    hires_denoise: float = 0.5
    tiled: bool = False
    tile: int = 1024
    overlap: int | None = None  # None: about an eighth of the tile
    attention_chunk: int | None = None  # None: all queries at once
    start: float = 0.0
    end: float = 1.0
    outside: str = "all"
    base: bool = True
    plan: dict[str, Any] = dataclasses.field(default_factory=dict)
    dtype: str = "fp32"
    model: str = DEFAULT_MODEL
    encoder: EncoderChoice | None = None  # None: the model's own

    @property
    def final_size(self) -> tuple[int, int]:
        """(width, height) of the picture that comes out."""
        factor = self.hires or 1.0
        width, height = (max(TOKEN, round(side * factor / TOKEN) * TOKEN) for side in self.size)
        return width, height

    @property
    def large(self) -> bool:
        """Whether it takes more than one call of the pipeline as it is."""
        return self.tiled or self.hires is not None

    @property
    def tile_overlap(self) -> int:
        return max(TOKEN, self.tile // 8 // TOKEN * TOKEN) if self.overlap is None else self.overlap

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
        if self.hires is not None:
            if not 1 < self.hires <= 16:
                raise invalid("--hires", f"{self.hires:g}x", "above 1x and at most 16x")
            if not (0 < self.hires_denoise <= 1 and int(self.steps * self.hires_denoise) >= 1):
                what = f"{self.hires_denoise} of {self.steps} steps"
                raise invalid("--hires-denoise", what, "at least one step's worth, at most 1")
        if self.attention_chunk is not None and self.attention_chunk < 1:
            raise invalid("--attention-chunk", f"{self.attention_chunk}", "a whole number >= 1")
        if self.tiled:
            check_tile(self.tile, self.tile_overlap)
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
    "tiled": bool, "tile": int,
}  # fmt: skip


def _pack(file: Embedded) -> dict[str, str]:
    return {"name": file.name, "data": base64.b64encode(file.data).decode()}


def _unpack(packed: dict[str, str]) -> Embedded:
    try:
        return Embedded(packed["name"], base64.b64decode(packed["data"], validate=True))
    except binascii.Error as error:
        raise ValueError(f"{packed['name']!r} is damaged") from error


@contextlib.contextmanager
def settings(pipe: Any, requests: Sequence[Request]) -> Iterator[Enabled]:
    """The pipeline with the requests' shift, guidance, chunks and regions; several requests are the rows of one launch
    and differ in prompts, regions and seed only."""
    first = requests[0]
    pipe.scheduler.set_shift(pipe.scheduler.config.shift if first.shift is None else first.shift)
    pipe.update_components(guider=pipe.guider.new(guidance_scale=first.guidance))
    rows = [
        [Region(region.mask.image("--region"), region.prompt, region.strength, region.priority) for region in r.regions]
        for r in requests
    ]
    chunks = contextlib.nullcontext() if first.attention_chunk is None else chunked(pipe, first.attention_chunk)
    with (
        chunks,
        enable(
            pipe,
            rows if len(rows) > 1 else rows[0],
            start_percent=first.start,
            end_percent=first.end,
            outside=first.outside,
            base=first.base,
            **first.plan,
        ) as enabled,
    ):
        yield enabled


def generate(pipe: Any, request: Request) -> tuple[list[Any], Enabled]:
    """The request's pictures (PIL), and what its regions did. Picture i is drawn from seed + i.

    Raises FloatingPointError when the model gives NaN; ValueError for a size that it does not take.
    """
    _check_side(pipe, request)
    image = None if request.image is None else request.image.upright("--image")
    generators = [torch.Generator().manual_seed(request.seed + i) for i in range(request.batch)]
    arguments: dict[str, Any] = {
        "prompt": request.prompt,
        "negative_prompt": request.negative,
        "num_inference_steps": request.steps,
        "num_images_per_prompt": request.batch,
        "generator": generators if request.batch > 1 else generators[0],
    }
    with settings(pipe, [request]) as enabled:
        if request.large:
            return _large(pipe, request, image, arguments), enabled
        if image is not None:
            arguments |= {"image": image, "strength": request.strength}
        width, height = request.size
        found = pipe(**arguments, width=width, height=height, output_type="pt", output="images")
    if not bool(torch.isfinite(found).all()):
        raise FloatingPointError(f"the model gave NaN in {request.dtype}")
    processor = pipe.image_processor
    return processor.numpy_to_pil(processor.pt_to_numpy(found)), enabled


def _large(pipe: Any, request: Request, image: Any, arguments: dict[str, Any]) -> list[Any]:
    """The pictures of a request that is tiled or has a hires pass. The latter starts from the first pass's pictures,
    enlarged as pictures: latents have no meaning between their places."""
    from PIL import Image

    with contextlib.ExitStack() as stack:
        tiles = None
        if request.tiled:
            tiles = stack.enter_context(tiled(pipe, request.tile, request.tile_overlap))
        stack.enter_context(latents_only(pipe))

        def sampled(size: tuple[int, int], start: list[Any] | None, strength: float) -> list[Any]:
            own = {"width": size[0], "height": size[1], **arguments}
            if start is not None:
                latents = [encode(pipe, one.resize(size, Image.Resampling.LANCZOS), tiles) for one in start]
                own |= {"image_latents": torch.cat(latents), "strength": strength, "num_images_per_prompt": 1}
                own |= {name: [own[name]] * len(start) for name in ("prompt", "negative_prompt")}
            latents = pipe(**own, output="latents")
            if not bool(torch.isfinite(latents).all()):
                raise FloatingPointError(f"the model gave NaN in {request.dtype}")
            return decode(pipe, latents, tiles)

        pictures = sampled(request.size, None if image is None else [image] * request.batch, request.strength)
        if request.hires is not None:
            pictures = sampled(request.final_size, pictures, request.hires_denoise)
    return pictures


def _check_side(pipe: Any, request: Request) -> None:
    """The rotary embedding is made for so many tokens a side; diffusers fails with shapes that do not fit."""
    largest = max(pipe.transformer.rope.max_size) * TOKEN
    if not request.tiled and max(request.final_size) > largest:
        size = "x".join(map(str, request.final_size))
        raise invalid("--size, --hires", f"{size} at once", f"at most {largest} a side; larger ones with --tiled")
    if request.tiled and min(request.tile, max(request.final_size)) > largest:
        raise invalid("--tile", f"{request.tile}", f"at most {largest}, for this model")


@torch.no_grad()
def preview(pipe: Any, block_state: Any) -> Any:
    """The first picture of a running loop as the model sees it now, without its noise (PIL)."""
    scheduler = pipe.scheduler
    sigma = scheduler.sigmas[scheduler.step_index]
    clean = block_state.latents[:1] - sigma * block_state.noise_pred[:1]
    return decode(pipe, clean, getattr(pipe.transformer, "_anima_fast_tiles", None))[0]


def png(image: Any, request: Request | None = None) -> bytes:
    """The picture as a PNG file, with the request's record."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    if request is not None:
        info.add_text(CHUNK, json.dumps(request.to_json()))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def write_png(image: Any, path: Path, request: Request | None = None) -> None:
    """`png` in a file, whole or not at all."""
    write_atomic(path, png(image, request))


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
