"""`anima-fast regions`: how masks land on the model's tokens, as pictures and figures, and the plan as a file.

The input is a list of mask images, one a region (each prompt 77 tokens padded to 512, as Anima does it), or one region
file, a JSON object:

    {
      "size": "1024x1024",                        width x height in pixels; --size overrides it
      "base": {"tokens": 60, "pads": 452},        the base prompt; leave out for none
      "regions": [
        {
          "name": "left",                         unique; default: the mask's file name
          "mask": "left.png",                     any image, any size; relative to this file
          "tokens": 77, "pads": 435,              rows of the prompt, and zero rows it is padded with (default 0)
          "strength": 1.0, "priority": 0          optional, as in RegionPlan.from_masks
        }
      ],
      "mode": "soft_log"                          and any other keyword of RegionPlan.from_masks: combine, pads, eps,
    }                                             strength, hard_value, normalize_overlaps, base_always_allowed,
                                                  unmasked_to_base, base_weight, resample

Rows of the context: the base prompt's tokens, then each region's in order, without pads.

Written to --out: overlay.png, tokens.png, weights_<name>.png for each region, plan.safetensors (`RegionPlan.load`).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
from pathlib import Path
from typing import Any

import torch

from ..bench.cases import token_grid
from ..errors import invalid
from ..masks import load_mask
from ..plan import RegionPlan

__all__ = ["Regions", "parse_size", "read_masks", "read_region_file", "run"]

_FILE_KEYS = ("size", "base", "regions")
_REGION_KEYS = ("name", "mask", "tokens", "pads", "strength", "priority")
# What errors of RegionPlan.from_masks call a region's values, and the file's key for it.
_KEY_OF = {"token_ranges": "tokens", "pad_counts": "pads", "region_strengths": "strength", "priorities": "priority"}
_KEYWORDS: dict[str, str] = {
    "mode": "a string",
    "combine": "a string",
    "pads": "a string",
    "resample": "a string",
    "eps": "a number",
    "strength": "a number",
    "hard_value": "a number",
    "base_weight": "a number",
    "normalize_overlaps": "true or false",
    "base_always_allowed": "true or false",
    "unmasked_to_base": "true or false",
}

# Anima's text context, and a prompt as long as CLIP's.
_TOKENS, _PADDED = 77, 512

# A mask stretched by less than this to fit the picture is not worth a warning.
_STRETCH = 0.02


@dataclasses.dataclass(frozen=True)
class Regions:
    """A plan with the names of its regions and the picture it is for, (width, height) in pixels."""

    plan: RegionPlan
    names: tuple[str, ...]
    size: tuple[int, int]
    sizes: tuple[tuple[int, int], ...]  # (width, height) of each mask as it was read


def run(options: argparse.Namespace) -> int:
    """Write the pictures and the plan; print the figures."""
    paths = [Path(name) for name in options.files]
    if any(path.suffix.lower() == ".json" for path in paths):
        if len(paths) > 1:
            raise invalid("FILE", f"{len(paths)} files with a .json among them", "one region file, or mask images only")
        regions = read_region_file(paths[0], options.size)
    else:
        regions = read_masks(paths, options.size)
    report = describe(regions)
    out = Path(options.out)
    if out.exists() and not out.is_dir():
        raise invalid("--out", f"{str(out)!r}, which is a file", "a directory")
    out.mkdir(parents=True, exist_ok=True)
    report["files"] = draw(regions, report, out)
    if options.json:
        print(json.dumps(report, indent=1))
        return 0
    width, height = regions.size
    grid = report["grid"]
    print(f"{width} x {height} pixels, {grid[2]} x {grid[1]} tokens ({grid[1] * grid[2]}), {modes(regions.plan)}")
    longest = max(len(entry["name"]) for entry in report["regions"])
    for entry in report["regions"]:
        print(
            f"  {entry['name']:<{longest}}  covers {_percent(entry['coverage'])}, "
            f"overlapped {_percent(entry['overlap'])}, {entry['tokens']} tokens + {entry['pads']} pads, "
            f"strength {entry['strength']:g}"
        )
    if report["base"]:
        print(f"  {'base':<{longest}}  {report['base']['tokens']} tokens + {report['base']['pads']} pads")
    print(f"  overlapping {_percent(report['overlap'])}, uncovered {_percent(report['uncovered'])} of the tokens")
    print(f"written to {out}: {', '.join(report['files'])}")
    for warning in report["warnings"]:
        print(f"anima-fast regions: warning: {warning}", file=sys.stderr)
    return 0


def parse_size(text: str) -> tuple[int, int]:
    """ "832x1216" -> (832, 1216)."""
    match = re.fullmatch(r"\s*(\d{1,6})\s*[x×]\s*(\d{1,6})\s*", text)
    if match is None or not all(16 <= int(n) <= 65536 for n in match.groups()):
        raise ValueError(f"got {text!r}; allowed: WIDTHxHEIGHT in pixels, each from 16 to 65536, such as 1024x1024")
    return int(match[1]), int(match[2])


def read_masks(paths: list[Path], size: tuple[int, int] | None) -> Regions:
    """One region for each image; the picture is as large as the first one unless `size` is given."""
    masks = [load_mask(path, f"FILE {path.name}") for path in paths]
    names: list[str] = []
    for path in paths:
        same = sum(name == path.stem or name.startswith(f"{path.stem} ") for name in names)
        names.append(f"{path.stem} {same + 1}" if same else path.stem)
    sizes = tuple((mask.shape[1], mask.shape[0]) for mask in masks)
    ranges = [(i * _TOKENS, (i + 1) * _TOKENS) for i in range(len(masks))]
    plan = RegionPlan.from_masks(masks, ranges, pad_counts=[_PADDED - _TOKENS] * len(masks))
    return Regions(plan, tuple(names), size or parse_size("{}x{}".format(*sizes[0])), sizes)


def read_region_file(path: Path, size: tuple[int, int] | None = None) -> Regions:
    """The regions of a JSON file (format above); `size` overrides the file's.

    Raises ValueError, TypeError or FileNotFoundError naming the file, the key, what came and what is allowed.
    """
    if not path.is_file():
        raise FileNotFoundError(f"FILE: no file {str(path)!r}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: line {error.lineno}, column {error.colno}: {error.msg}; allowed: JSON") from error
    except UnicodeDecodeError as error:
        raise invalid(str(path), "bytes that are not UTF-8", "JSON text") from error
    _object(f"{path}", content, (*_FILE_KEYS, *_KEYWORDS))
    if size is None:
        text = _get(path, content, "size", "a string")
        try:
            size = parse_size(text)
        except ValueError as error:
            raise ValueError(f"{path}: size: {error}") from error
    keywords: dict[str, Any] = {}
    for key, kind in _KEYWORDS.items():
        if key in content and not (key == "hard_value" and content[key] is None):
            keywords[key] = _get(path, content, key, kind)
    row = 0
    if content.get("base") is not None:
        base = content["base"]
        _object(f"{path}: base", base, ("tokens", "pads"))
        row = _whole(path, base, "base.tokens")
        keywords.update(base_range=(0, row), base_pad_count=_whole(path, base, "base.pads", 0))
    entries = _get(path, content, "regions", "a list")
    if not entries:
        raise invalid(f"{path}: regions", "an empty list", "at least one region")
    masks, names, ranges, pads, strengths, priorities = [], [], [], [], [], []
    for i, entry in enumerate(entries):
        here = f"regions[{i}]"
        _object(f"{path}: {here}", entry, _REGION_KEYS)
        file = _get(path, entry, f"{here}.mask", "a string")
        masks.append(load_mask(path.parent / file, f"{path}: {here}.mask"))
        name = _get(path, entry, f"{here}.name", "a string", Path(file).stem)
        if not name.strip() or name in names:
            raise invalid(f"{path}: {here}.name", f"{name!r} again" if name in names else repr(name), "a unique name")
        names.append(name)
        tokens = _whole(path, entry, f"{here}.tokens")
        ranges.append((row, row + tokens))
        row += tokens
        pads.append(_whole(path, entry, f"{here}.pads", 0))
        strengths.append(_get(path, entry, f"{here}.strength", "a number", 1.0))
        priorities.append(_get(path, entry, f"{here}.priority", "a number", 0))
    try:
        plan = RegionPlan.from_masks(
            masks, ranges, pad_counts=pads, region_strengths=strengths, priorities=priorities, **keywords
        )
    except (ValueError, TypeError) as error:
        pattern = rf"^({'|'.join(_KEY_OF)})\[(\d+)\]"
        text = re.sub(pattern, lambda m: f"regions[{m[2]}].{_KEY_OF[m[1]]}", str(error))
        raise type(error)(f"{path}: {text}") from error
    return Regions(plan, tuple(names), size, tuple((mask.shape[1], mask.shape[0]) for mask in masks))


def describe(regions: Regions) -> dict[str, Any]:
    """Figures and warnings as plain data. Shares are of the tokens; a weight is the mask's mean over a token.

    coverage   a region's mean weight
    overlap    tokens whose weights sum to more than 1 (of a region: the share of its weight that lies there)
    uncovered  tokens whose weights sum to eps or less
    excluded   tokens that no prompt is allowed to reach: they attend to all of them
    """
    plan = regions.plan
    grid, canvas = token_grid(*regions.size)
    raw = dataclasses.replace(plan, normalize_overlaps=False).token_weights(grid, canvas)
    total = raw.sum(dim=0)
    over = total > 1.01  # 1 % for the rounding of 8-bit masks that meet
    uncovered = float((total <= plan.eps).double().mean())
    excluded = _excluded(plan, grid, canvas)
    entries = []
    warnings = []
    for i, name in enumerate(regions.names):
        start, end = plan.token_ranges[i]
        highest = float(raw[i].max())
        overlapped = float(raw[i][over].sum() / raw[i].sum()) if highest else 0.0
        entries.append(
            {
                "name": name,
                "tokens": end - start,
                "rows": [start, end],
                "pads": plan.pad_counts[i],
                "strength": plan.strength * plan.region_strengths[i],
                "coverage": float(raw[i].mean()),
                "overlap": overlapped,
                "highest_weight": highest,
            }
        )
        warnings += _mask_warnings(name, plan, i, highest, regions)
    if uncovered > excluded:  # else the next warning says it all
        if plan.base_range is not None:
            means = "there only the base prompt counts fully"
        elif plan.combine == "logit" and plan.mode == "soft_log":
            means = "without a base prompt every region counts alike there"
        else:
            means = "without a base prompt they attend to every region"
        warnings.append(f"{_percent(uncovered)} of the tokens are in no region: {means}")
    if excluded > 0:
        warnings.append(
            f"{_percent(excluded)} of the tokens are excluded by every prompt, and attend to all of them unbiased; "
            "a base prompt that is always allowed would serve them"
        )
    base = plan.base_range
    return {
        "size": list(regions.size),
        "grid": list(grid),
        "canvas": list(canvas),
        "mode": plan.mode,
        "combine": plan.combine,
        "regions": entries,
        "base": None
        if base is None
        else {"tokens": base[1] - base[0], "rows": list(base), "pads": plan.base_pad_count},
        "overlap": float(over.double().mean()),
        "uncovered": uncovered,
        "excluded": excluded,
        "warnings": warnings,
    }


def _mask_warnings(name: str, plan: RegionPlan, i: int, highest: float, regions: Regions) -> list[str]:
    found = []
    largest = float(plan.masks[i].max())
    if largest == 0:
        taken = " (regions of higher priority may have taken all of it)" if len(plan.masks) > 1 else ""
        found.append(f"region {name!r} is empty: its mask is 0 everywhere{taken}")
    elif highest <= plan.eps:
        text = f"its weight is eps ({plan.eps:g}) or less on every token; try resample='max'"
        found.append(f"region {name!r} vanishes: {text}")
    elif plan.mode == "hard" and highest <= 0.5:
        found.append(
            f"region {name!r} vanishes: mode 'hard' takes weights above 0.5, and its highest on the token grid is "
            f"{highest:.2g}; try resample='max'"
        )
    width, height = regions.sizes[i]
    stretch = (width / height) / (regions.size[0] / regions.size[1])
    if not 1 - _STRETCH <= stretch <= 1 + _STRETCH:
        found.append(
            f"the mask of region {name!r} is {width} x {height} and is stretched to "
            f"{regions.size[0]} x {regions.size[1]}"
        )
    return found


def _excluded(plan: RegionPlan, grid: tuple[int, int, int], canvas: tuple[float, float]) -> float:
    """The share of tokens that every segment excludes; binding the plan lets these attend to all."""
    excluded = 0.0 if plan.combine == "blend" else -torch.inf
    return float((plan.segment_rows(grid, canvas) == excluded).all(dim=0).double().mean())


def draw(regions: Regions, report: dict[str, Any], out: Path) -> list[str]:
    """Write the pictures and the plan to a directory; the names of the files."""
    from tqdm import tqdm

    from .region_pictures import colours, overlay, token_grid_preview, weight_map

    plan = regions.plan
    weights = plan.token_weights(tuple(report["grid"]), tuple(report["canvas"]))
    legend: list[tuple[str, tuple[int, int, int] | None, str]] = [
        (
            entry["name"],
            colour,
            f"covers {_percent(entry['coverage'])}, overlapped {_percent(entry['overlap'])}",
        )
        for entry, colour in zip(report["regions"], colours(len(regions.names)), strict=True)
    ]
    if report["base"]:
        where = "everywhere" if plan.base_always_allowed or plan.combine == "blend" else "where no region is"
        legend.append(("base prompt", None, where))
    legend.append(("overlapping", None, f"{_percent(report['overlap'])} of the tokens"))
    legend.append(("uncovered", (66, 71, 82), f"{_percent(report['uncovered'])} of the tokens"))
    width, height = regions.size
    _, rows, columns = report["grid"]
    pictures = {
        "overlay.png": lambda: overlay(
            plan, regions.names, regions.size, weights, legend, f"{width} x {height} pixels"
        ),
        "tokens.png": lambda: token_grid_preview(weights, legend, f"{columns} x {rows} tokens"),
    }
    for name, weight, (_, _, figures) in zip(regions.names, weights, legend, strict=False):
        text = f"weight on {columns} x {rows} tokens · {figures}"
        file = f"weights_{_file_name(name, pictures)}.png"
        pictures[file] = lambda weight=weight, name=name, text=text: weight_map(weight, name, text)  # type: ignore[misc]
    for file, picture in tqdm(pictures.items(), desc="drawing", file=sys.stderr, disable=not sys.stderr.isatty()):
        picture().save(out / file)
    plan.save(out / "plan.safetensors")
    return [*pictures, "plan.safetensors"]


def _file_name(name: str, taken: dict[str, Any]) -> str:
    """A region's name as part of a file name, different from those taken."""
    safe = plain = re.sub(r"[^\w-]+", "_", name).strip("_") or "region"
    number = 2
    while f"weights_{safe}.png" in taken:
        safe, number = f"{plain}_{number}", number + 1
    return safe


def modes(plan: RegionPlan) -> str:
    return plan.mode if plan.combine == "logit" else f"{plan.combine} ({plan.mode})"


def _percent(share: float) -> str:
    return "0 %" if share == 0 else "< 0.1 %" if share < 0.001 else f"{100 * share:.1f} %"


def _object(where: str, value: Any, keys: tuple[str, ...]) -> None:
    if not isinstance(value, dict):
        raise invalid(where, _kind(value), "an object")
    for key in value:
        if key not in keys:
            raise invalid(where, f"the unknown key {key!r}", " | ".join(keys))


_MISSING = object()


def _get(path: Path, values: dict[str, Any], where: str, kind: str, default: Any = _MISSING) -> Any:
    """`values[last part of where]`, which must be of a kind."""
    key = where.rpartition(".")[2]
    value = values.get(key, default)
    if value is _MISSING:
        raise invalid(f"{path}: {where}", "nothing", f"{kind}; it is required")
    fits = {
        "a string": isinstance(value, str),
        "a number": isinstance(value, (int, float)) and not isinstance(value, bool),
        "true or false": isinstance(value, bool),
        "a list": isinstance(value, list),
    }
    if not fits[kind]:
        raise invalid(f"{path}: {where}", _kind(value), kind)
    return value


def _whole(path: Path, values: dict[str, Any], where: str, default: Any = _MISSING) -> int:
    value = _get(path, values, where, "a number", default)
    if value != int(value) or value < 0:
        raise invalid(f"{path}: {where}", f"{value}", "a whole number >= 0")
    return int(value)


def _kind(value: Any) -> str:
    if isinstance(value, (dict, list)):
        return "an object" if isinstance(value, dict) else "a list"
    return json.dumps(value)
