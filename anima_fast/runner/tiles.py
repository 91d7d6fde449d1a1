"""Pictures larger than the model takes at once: the transformer, the decoder and the encoder run on overlapping tiles.

    with tiled(pipe, tile=1024, overlap=128):
        pipe(prompt="a village", width=4096, height=4096)

`tiled` cuts every call of the transformer into tiles and puts its predictions together again, weighted, so that the
guider and the scheduler see one canvas. Predictions are blended and not latents: for an Euler step, which is linear in
the prediction, both are the same, and other samplers keep one history and one noise instead of one a tile. Each tile's
regions are the crop of the whole plan (`RegionPlan.crop`). A tile begins at position 0 of the rotary embedding; only
differences of positions count there.

Weights are multiples of 2^-10, so that they sum to 1 exactly, in any order, also as products of rows and columns.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch

from ..errors import invalid

__all__ = ["TOKEN", "Layout", "Tiles", "check_tile", "decode", "encode", "latents_only", "spans", "tiled", "weights"]

#: Pixels a token covers.
TOKEN = 16

_QUANTUM = 1024  # weights are whole numbers of 1 / _QUANTUM: 10 bits, their products 20 of a float's 24

Span = tuple[int, int]


def spans(length: int, tile: int, overlap: int) -> list[Span]:
    """[start, stop) of the tiles along one side: as few as do, equally long, at most `tile`, neighbours sharing
    `overlap` at least. Raises nothing for 0 <= 3 * overlap <= tile.

    Example:
        >>> spans(100, 64, 8)
        [(0, 54), (46, 100)]
    """
    if length <= tile:
        return [(0, length)]
    count = -(-(length - overlap) // (tile - overlap))
    size = -(-(length + (count - 1) * overlap) // count)
    starts = [round(k * (length - size) / (count - 1)) for k in range(count)]
    return [(start, start + size) for start in starts]


def weights(of: list[Span], overlap: int, unit: int) -> list[torch.Tensor]:
    """For each span its weights, `unit` of them for each of its places: 1 inside, and a smooth step over `overlap`
    places in the middle of what it shares with a neighbour. They sum to 1 at every place."""
    found = [torch.ones((stop - start) * unit) for start, stop in of]
    width = overlap * unit
    x = (torch.arange(width) + 0.5) / max(width, 1)
    rise = (x * x * (3 - 2 * x) * _QUANTUM).round() / _QUANTUM
    for k in range(len(of) - 1):
        common = (of[k][1] - of[k + 1][0]) * unit
        skip = (common - width) // 2
        after = torch.cat([torch.zeros(skip), rise, torch.ones(common - width - skip)])
        found[k + 1][:common] = after
        found[k][len(found[k]) - common :] = 1 - after
    return found


@dataclasses.dataclass(frozen=True)
class Layout:
    """The tiles of a canvas of `rows` x `columns`, in tokens."""

    rows: list[Span]
    columns: list[Span]
    overlap: int

    @classmethod
    def of(cls, height: int, width: int, tile: int, overlap: int) -> Layout:
        return cls(spans(height, tile, overlap), spans(width, tile, overlap), overlap)

    def __len__(self) -> int:
        return len(self.rows) * len(self.columns)

    def __iter__(self) -> Iterator[tuple[Span, Span]]:
        return ((row, column) for row in self.rows for column in self.columns)

    def box(self, row: Span, column: Span) -> tuple[float, float, float, float]:
        """(top, left, bottom, right) as fractions of the canvas."""
        height, width = self.rows[-1][1], self.columns[-1][1]
        return row[0] / height, column[0] / width, row[1] / height, column[1] / width

    def weights(self, unit: int, device: torch.device) -> Iterator[torch.Tensor]:
        """Each tile's [height, width] in places of 1 / unit token, in the order of the tiles."""
        down, across = (
            [line.to(device) for line in weights(of, self.overlap, unit)] for of in (self.rows, self.columns)
        )
        return (y[:, None] * x for y in down for x in across)


@dataclasses.dataclass
class Tiles:
    """How large tiles are, in tokens. `box` is the tile that the transformer works on now; None: the whole canvas."""

    size: int
    overlap: int
    box: tuple[float, float, float, float] | None = None

    def layout(self, height: int, width: int) -> Layout:
        return Layout.of(height, width, self.size, self.overlap)


def check_tile(tile: int, overlap: int) -> None:
    """Raises ValueError for pixels that are no tiles. Errors name the command's options."""
    if tile < 4 * TOKEN or tile % TOKEN:
        raise invalid("--tile", f"{tile}", f"a multiple of {TOKEN}, {4 * TOKEN} or more")
    if not 0 <= overlap <= tile // 3 or overlap % TOKEN:
        largest = tile // 3 // TOKEN * TOKEN
        raise invalid("--overlap", f"{overlap}", f"a multiple of {TOKEN}, at most {largest}, a third of --tile")


@contextlib.contextmanager
def tiled(pipe: Any, tile: int = 1024, overlap: int = 128) -> Iterator[Tiles]:
    """Within it, the pipeline's transformer works on tiles of at most `tile` x `tile` pixels that share `overlap`.

    A canvas of one tile is computed as without. Works with `integrations.diffusers.enable`, in either order.

    Raises:
        ValueError: for sizes that are no tiles, or a transformer that is tiled already.

    Example:
        >>> with tiled(pipe, tile=1024, overlap=128):
        ...     pipe(prompt="a village", width=4096, height=4096)
    """
    check_tile(tile, overlap)
    transformer = pipe.transformer
    if hasattr(transformer, "_anima_fast_tiles"):
        raise invalid("pipe", "one whose transformer is tiled already", "one tiling at a time")
    state = Tiles(tile // TOKEN, overlap // TOKEN)
    before = vars(transformer).get("forward")  # a wrapper of accelerate's, say
    transformer.forward = _on_tiles(transformer, state)
    transformer._anima_fast_tiles = state
    try:
        yield state
    finally:
        del transformer._anima_fast_tiles, transformer.forward
        if before is not None:
            transformer.forward = before


def _on_tiles(transformer: Any, state: Tiles) -> Any:
    original = transformer.forward
    signature = inspect.signature(original)

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if state.box is not None:
            return original(*args, **kwargs)
        given = signature.bind(*args, **kwargs).arguments
        for name in ("condition_mask", "block_controlnet_hidden_states"):
            if given.get(name) is not None:
                raise invalid(name, "a value", "none while the transformer is tiled")
        canvas, mask = given["hidden_states"], given.get("padding_mask")
        unit = transformer.config.patch_size[1]
        layout = state.layout(*(side // unit for side in canvas.shape[-2:]))
        blended = canvas.new_zeros(canvas.shape, dtype=torch.float32)
        try:
            for (row, column), weight in zip(layout, layout.weights(unit, canvas.device), strict=True):
                state.box = layout.box(row, column)
                places = slice(row[0] * unit, row[1] * unit), slice(column[0] * unit, column[1] * unit)
                own = {**given, "hidden_states": canvas[..., places[0], places[1]], "return_dict": False}
                if mask is not None:
                    down, across = (m // c for m, c in zip(mask.shape[-2:], canvas.shape[-2:], strict=True))
                    own["padding_mask"] = mask[
                        ...,
                        places[0].start * down : places[0].stop * down,
                        places[1].start * across : places[1].stop * across,
                    ]
                part = transformer(**own)[0]  # with the hooks of a call: regions are of a tile
                blended[..., places[0], places[1]] += part * weight
        finally:
            state.box = None
        blended = blended.to(part.dtype)
        if given.get("return_dict", True):
            return importlib.import_module("diffusers.models.modeling_outputs").Transformer2DModelOutput(blended)
        return (blended,)

    return forward


@contextlib.contextmanager
def latents_only(pipe: Any) -> Iterator[None]:
    """Within it, the pipeline ends before the decoder."""
    blocks = pipe._blocks.sub_blocks
    last = blocks.pop("decode")
    try:
        yield
    finally:
        blocks["decode"] = last


def _latent_statistics(vae: Any, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    mean, std = (
        torch.tensor(values, device=device).view(1, -1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return mean, std


@torch.no_grad()
def decode(pipe: Any, latents: torch.Tensor, tiles: Tiles | None = None) -> list[Any]:
    """The pictures (PIL) of latents [B, 16, 1, H, W]; tile by tile, and no more than a row of tiles as numbers.

    diffusers' own tiling keeps every decoded tile until the last, and its last tiles can be slivers.

    Raises FloatingPointError when they are not finite.
    """
    import numpy as np
    from PIL import Image

    vae = pipe.vae
    mean, std = _latent_statistics(vae, latents.device)
    inverse = 1 / std.to(vae.dtype)  # rounded as diffusers does: in bf16 another rounding is another picture
    mean = mean.to(vae.dtype)
    height, width = (side // 2 for side in latents.shape[-2:])
    layout = tiles.layout(height, width) if tiles else Layout([(0, height)], [(0, width)], 0)
    pictures = []
    for one in latents.split(1):
        picture = np.empty((height * TOKEN, width * TOKEN, 3), np.uint8)
        size = (layout.rows[0][1] - layout.rows[0][0]) * TOKEN
        strip = torch.zeros(3, size, width * TOKEN, device=latents.device)
        place = layout.weights(TOKEN, latents.device)
        for k, (top, bottom) in enumerate(layout.rows):
            for left, right in layout.columns:
                own = one[..., top * 2 : bottom * 2, left * 2 : right * 2].to(vae.dtype)
                part = vae.decode(own / inverse + mean, return_dict=False)[0][0, :, 0].float()
                if not bool(torch.isfinite(part).all()):
                    raise FloatingPointError("the decoder gave NaN")
                strip[:, :, left * TOKEN : right * TOKEN] += part * next(place)
            done = (layout.rows[k + 1][0] - top if k + 1 < len(layout.rows) else bottom - top) * TOKEN
            finished = ((strip[:, :done] / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
            picture[top * TOKEN : top * TOKEN + done] = finished.permute(1, 2, 0).cpu().numpy()
            strip = torch.cat([strip[:, done:], torch.zeros_like(strip[:, :done])], dim=1)
        pictures.append(Image.fromarray(picture))
    return pictures


@torch.no_grad()
def encode(pipe: Any, image: Any, tiles: Tiles | None = None) -> torch.Tensor:
    """The latents [1, 16, 1, H, W] of a PIL picture whose sides are multiples of 16, tile by tile."""
    vae, device = pipe.vae, pipe._execution_device
    mean, std = _latent_statistics(vae, device)
    width, height = (side // TOKEN for side in image.size)
    layout = tiles.layout(height, width) if tiles else Layout([(0, height)], [(0, width)], 0)
    latents = torch.zeros(1, vae.config.z_dim, 1, height * 2, width * 2, device=device)
    for (row, column), weight in zip(layout, layout.weights(2, device), strict=True):
        crop = image.crop((column[0] * TOKEN, row[0] * TOKEN, column[1] * TOKEN, row[1] * TOKEN))
        own = pipe.image_processor.preprocess(crop)[:, :, None].to(device, vae.dtype)
        part = (vae.encode(own).latent_dist.mode() - mean.to(vae.dtype)) / std.to(vae.dtype)
        latents[..., row[0] * 2 : row[1] * 2, column[0] * 2 : column[1] * 2] += part.float() * weight
    return latents
