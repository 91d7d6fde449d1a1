"""Random regional-attention calls for hypothesis: plans with every parameter, odd shapes, permuted views."""

from __future__ import annotations

import dataclasses

import torch
from hypothesis import strategies as st

from anima_fast import BoundPlan, RegionPlan


@dataclasses.dataclass
class Case:
    """One call. `describe()` is what a failing test prints."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    plan: BoundPlan
    scale: float
    text: str

    def describe(self) -> str:
        return (
            f"q {list(self.q.shape)} {self.q.dtype} strides {self.q.stride()}, k {list(self.k.shape)}, "
            f"scale {self.scale:g}, {self.text}\n{self.plan!r}"
        )


@st.composite
def region_plans(draw, keys: int):
    """(RegionPlan over a context of `keys` rows, the arguments as text)."""
    regions = draw(st.integers(0, 5))
    base = regions == 0 or draw(st.booleans())
    count = regions + base
    cuts = sorted(draw(st.lists(st.integers(0, keys), min_size=2 * count, max_size=2 * count)))
    ranges = [(cuts[2 * i], cuts[2 * i + 1]) for i in range(count)]
    order = draw(st.permutations(range(count)))
    ranges = [ranges[i] for i in order]  # prompts need not lie in the regions' order
    pads = [draw(st.sampled_from([0, 0, 1, 7, 435])) for _ in range(count)]
    options = {
        "mode": draw(st.sampled_from(["soft_log", "hard"])),
        "combine": draw(st.sampled_from(["logit", "blend"])),
        "eps": draw(st.sampled_from([1e-4, 1e-3, 1e-30, 1.0])),
        "strength": draw(st.sampled_from([1.0, 0.35, 0.0, 3.0])),
        "normalize_overlaps": draw(st.booleans()),
        "base_always_allowed": draw(st.booleans()),
        "unmasked_to_base": draw(st.booleans()),
        "base_weight": draw(st.sampled_from([0.0, 0.3, 2.0])),
        "resample": draw(st.sampled_from(["area", "bilinear", "nearest", "max"])),
        "pads": draw(st.sampled_from(["fold", "fold", "strip"])),
    }
    if options["mode"] == "hard" and draw(st.booleans()):
        options["hard_value"] = draw(st.sampled_from([-80.0, -28.0, 0.0, -1e4]))
    if regions and draw(st.booleans()):
        options["region_strengths"] = [draw(st.sampled_from([1.0, 0.0, 0.5, 2.0])) for _ in range(regions)]
    if regions and draw(st.booleans()):
        options["priorities"] = [draw(st.integers(0, 2)) for _ in range(regions)]
    if base:
        options["base_range"] = ranges[-1]
        options["base_pad_count"] = pads[-1]
    if not any(e > s or (p and options["pads"] == "fold") for (s, e), p in zip(ranges, pads, strict=True)):
        ranges[0] = (0, keys)
        ranges[1:] = [(keys, keys)] * (count - 1)
        if base:
            options["base_range"] = ranges[-1]
    seed = draw(st.integers(0, 2**16))
    generator = torch.Generator().manual_seed(seed)
    masks = []
    for _ in range(regions):
        height, width = draw(st.integers(1, 20)), draw(st.integers(1, 20))
        kind = draw(st.sampled_from(["soft", "binary", "half", "empty", "full"]))
        mask = torch.rand(height, width, generator=generator)
        if kind == "binary":
            mask = mask.round()
        elif kind == "half":
            mask = torch.zeros(height, width)
            mask[:, : (width + 1) // 2] = 1
        elif kind in ("empty", "full"):
            mask = torch.full((height, width), float(kind == "full"))
        masks.append(mask)
    plan = RegionPlan.from_masks(masks, ranges[:regions], pad_counts=pads[:regions], **options)
    return plan, f"masks from seed {seed}, {options}"


@st.composite
def calls(draw, dtypes=(torch.float32, torch.float16, torch.bfloat16), most_queries=150, head_dims=None):
    """A `Case`: q, k, v of one type in one of three layouts, and a bound plan, perhaps one a row."""
    keys = draw(st.integers(1, 90))
    rows, columns = draw(st.integers(1, 13)), draw(st.integers(1, 13))
    frames = draw(st.sampled_from([1, 1, 2]))
    while frames * rows * columns > most_queries:
        rows = (rows + 1) // 2
    grid = (frames, rows, columns)
    plan, text = draw(region_plans(keys))
    bound = plan.bind(grid)
    batch = draw(st.integers(1, 3))
    if batch > 1 and draw(st.booleans()):
        plain = RegionPlan.plain(draw(st.integers(1, keys)), draw(st.sampled_from([0, 9]))).bind(grid)
        bound = BoundPlan.batch([plain, bound], [draw(st.integers(0, 1)) for _ in range(batch)])
    kv_heads = draw(st.sampled_from([1, 2]))
    heads = kv_heads * draw(st.sampled_from([1, 2, 3]))
    head_dim = draw(st.sampled_from(head_dims or [16, 17, 32, 40, 64, 72, 80, 96, 128, 160, 256]))
    dtype = draw(st.sampled_from(dtypes))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    size = draw(st.sampled_from([1.0, 1.0, 0.0, 8.0]))

    def tensor(length, count):
        layout = draw(st.sampled_from(["bhnd", "bnhd", "sliced"]))
        if layout == "bhnd":
            x = torch.randn(batch, count, length, head_dim, generator=generator)
        elif layout == "bnhd":
            x = torch.randn(batch, length, count, head_dim, generator=generator).transpose(1, 2)
        else:
            x = torch.randn(batch, count + 1, length, head_dim + 3, generator=generator)[:, 1:, :, 2:-1]
        return (x * size).to(dtype) if layout != "sliced" else _cast_in_place(x * size, dtype, head_dim)

    q, k, v = tensor(grid[0] * grid[1] * grid[2], heads), tensor(keys, kv_heads), tensor(keys, kv_heads)
    scale = draw(st.sampled_from([head_dim**-0.5, 1.0 / head_dim, 0.3]))
    return Case(q, k, v, bound, scale, text)


def _cast_in_place(x, dtype, head_dim):
    """x in `dtype` with an odd row stride and a storage offset."""
    wide = torch.zeros(*x.shape[:3], head_dim + 3, dtype=dtype)
    wide[..., 2:-1] = x.to(dtype)
    return wide[..., 2:-1]
