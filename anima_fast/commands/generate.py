"""`anima-fast generate`: pictures by diffusers' Anima pipeline, with regional prompts and a record to repeat them."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import secrets
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch

from ..errors import invalid
from ..runner.encoder import EncoderChoice, check_width, replacements
from ..runner.model import find, load, quiet
from ..runner.request import (
    DTYPES,
    Embedded,
    Request,
    RequestRegion,
    generate,
    plan_value,
    preview,
    read_record,
    stretched,
    write_png,
)
from .bench import check_device, default_device

__all__ = ["read_request", "run"]


def run(options: argparse.Namespace) -> int:
    """Exit code 1 if the model gives NaN."""
    device = check_device(options.device or default_device())
    request = read_request(options, device)
    out = Path(options.out)
    if out.suffix.lower() != ".png":
        raise invalid("--out", repr(options.out), "a file name that ends in .png")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"--out: the directory {str(out.parent)!r} does not exist")
    request.check()
    notes = stretched(request.regions, request.final_size)
    started = time.perf_counter()
    directory = find(request.model)
    watch = _Watch(out.with_suffix(".preview.png"), options.preview)
    dtype = DTYPES[request.dtype]
    components: dict[str, Any] = {}
    if request.encoder is not None:
        with warnings.catch_warnings(record=True) as of_files:
            warnings.simplefilter("always", UserWarning)
            encoder, choice = request.encoder.load(device=device, dtype=dtype)
        notes += [str(w.message) for w in of_files if issubclass(w.category, UserWarning)]
        request = dataclasses.replace(request, encoder=choice)
        components = replacements(encoder, dtype)
    watch.pipe = load(directory, dtype=dtype, device=device, after_step=watch, components=components)
    if request.encoder is not None:
        check_width(watch.pipe, encoder)
    loaded = time.perf_counter()
    with warnings.catch_warnings(record=True) as caught, quiet(), watch:
        warnings.simplefilter("always", UserWarning)
        try:
            images, enabled = generate(watch.pipe, request)
        except FloatingPointError as error:
            print(f"anima-fast generate: {error}; try --dtype bf16 or fp32", file=sys.stderr)
            return 1
    notes += [str(w.message) for w in caught if str(w.message).startswith("regions[")]
    if request.regions and not enabled.served["regions"]:
        notes.append(f"no step fell between --start {request.start:g} and --end {request.end:g}: no region acted")
    notes += [f"cross-attention was left to diffusers: {reason}" for reason in enabled.declined]
    files = [out if i == 0 else out.with_name(f"{out.stem}_{i + 1}{out.suffix}") for i in range(request.batch)]
    for image, file in zip(images, files, strict=True):
        write_png(image, file, request)
    done = time.perf_counter()
    report: dict[str, Any] = {
        "files": [str(file) for file in files],
        "seed": request.seed,
        "size": list(request.final_size),
        "model": request.model,
        "device": device,
        "dtype": request.dtype,
        "encoder": None if request.encoder is None else dataclasses.asdict(request.encoder),
        "load_seconds": round(loaded - started, 3),
        "seconds": round(done - loaded, 3),
        "cross_attention_calls": dict(enabled.served),
        "warnings": notes,
    }
    if options.json:
        print(json.dumps(report, indent=1))
        return 0
    width, height = request.final_size
    print(
        f"{', '.join(report['files'])}: {width} x {height}, seed {request.seed}, {watch.steps} steps in "
        f"{report['seconds']:.1f} s ({device}, {request.dtype}; model loaded in {report['load_seconds']:.1f} s)"
    )
    for note in notes:
        print(f"anima-fast generate: warning: {note}", file=sys.stderr)
    return 0


def read_request(options: argparse.Namespace, device: str) -> Request:
    """The options over the record of `--like` over the defaults. Nothing is checked that `Request.check` checks."""
    like = read_record(options.like) if options.like else None
    if like is None and options.prompt is None:
        raise invalid("--prompt", "nothing", "a text, or --like with a picture made here")
    given: dict[str, Any] = {
        field.name: getattr(options, field.name)
        for field in dataclasses.fields(Request)
        if getattr(options, field.name, None) is not None and field.name not in ("regions", "image", "plan", "encoder")
    }
    given |= _encoder(options, like)
    if options.region:
        given["regions"] = _regions(options)
    elif options.region_strength or options.region_priority:
        raise invalid("--region-strength, --region-priority", "numbers without --region", "one for each --region")
    if options.image is not None:
        given["image"] = Embedded.read(options.image, "--image")
        if options.size is None:
            given["size"] = given["image"].size("--image")
    if options.plan:
        plan = dict(like.plan) if like else {}
        for text in options.plan:
            name, equals, value = text.partition("=")
            if not equals:
                raise invalid("--plan", repr(text), "NAME=VALUE, such as mode=hard")
            plan[name] = plan_value(name, value)
        given["plan"] = plan
    if like is not None:
        return dataclasses.replace(like, **given)
    given.setdefault("seed", secrets.randbelow(2**32))
    given.setdefault("dtype", "fp32" if torch.device(device).type == "cpu" else "bf16")
    return Request(**given)


def _encoder(options: argparse.Namespace, like: Request | None) -> dict[str, EncoderChoice | None]:
    """The encoder's options over those of the record; nothing if no option speaks of it."""
    names = {
        field.name: field.name for field in dataclasses.fields(EncoderChoice) if field.name not in ("file", "sums")
    }
    names["tokenizer"] = "encoder_tokenizer"
    given = {name: getattr(options, option) for name, option in names.items() if getattr(options, option) is not None}
    before = like.encoder if like is not None else None
    if options.encoder == "stock":
        if given:
            raise invalid("--encoder", f"'stock' with --{names[next(iter(given))].replace('_', '-')}", "one without")
        return {"encoder": None}
    if options.encoder is not None:
        return {"encoder": dataclasses.replace(before or EncoderChoice(""), file=options.encoder, **given)}
    if not given:
        return {}
    if before is None:
        raise invalid(f"--{names[next(iter(given))].replace('_', '-')}", "no --encoder", "--encoder FILE with it")
    return {"encoder": dataclasses.replace(before, **given)}


def _regions(options: argparse.Namespace) -> tuple[RequestRegion, ...]:
    count = len(options.region)
    values = {}
    for name, default in (("strength", 1.0), ("priority", 0.0)):
        numbers = getattr(options, f"region_{name}") or [default] * count
        if len(numbers) != count:
            raise invalid(f"--region-{name}", f"{len(numbers)} numbers for {count} regions", "one for each --region")
        values[name] = numbers
    regions = []
    for i, text in enumerate(options.region):
        cuts = [position for position, letter in enumerate(text) if letter == "="]
        if not cuts:
            raise invalid("--region", repr(text), 'MASK=PROMPT, such as left.png="a red house"')
        cut = next((position for position in cuts if Path(text[:position]).is_file()), cuts[0])
        mask = Embedded.read(text[:cut], "--region")
        regions.append(RequestRegion(mask, text[cut + 1 :], values["strength"][i], values["priority"][i]))
    return tuple(regions)


class _Watch(contextlib.AbstractContextManager["_Watch"]):
    """After each step: the progress bar on a terminal, and every `every` steps the preview."""

    def __init__(self, preview_path: Path, every: int | None) -> None:
        self.path, self.every = preview_path, every
        self.pipe: Any = None
        self.steps = 0
        self.bar: Any = None

    def __call__(self, done: int, total: int, block_state: Any) -> None:
        from tqdm import tqdm

        if done == 1:  # of the first pass, or of the next
            self.close()
            self.bar = tqdm(total=total, desc="sampling", file=sys.stderr, disable=not sys.stderr.isatty(), leave=False)
        self.steps += 1
        if self.every and done % self.every == 0 and done < total:
            write_png(preview(self.pipe, block_state), self.path)
        self.bar.update()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()

    def __exit__(self, *_: object) -> None:
        self.close()
