"""`anima-fast warmup`: compile the Triton kernels a model will need into Triton's cache.

There is no autotuning, so this is all there is to warm: each kernel variant of each type, for one head dimension
on one card.
"""

from __future__ import annotations

import argparse
import json
import sys
import time

import torch

from ..attention import OP
from ..bench.cases import DTYPES
from ..errors import invalid

__all__ = ["run"]


def run(options: argparse.Namespace) -> int:
    device = torch.device(_device(options.device))
    reason = next(b for b in OP.backends if b.name == "triton").unavailable()
    if not torch.cuda.is_available():
        reason = "no CUDA device"  # also where Triton's interpreter would run: it compiles nothing
    compiled: list[dict[str, object]] = []
    left_out: list[str] = []
    if reason is None:
        from tqdm import tqdm

        from ..kernels.regional_attention import COMBINES, supports, warmup

        capability = torch.cuda.get_device_capability(device)
        kinds = [(combine, dtype) for combine in COMBINES for dtype in options.dtype]
        for combine, dtype in tqdm(kinds, desc="compiling", file=sys.stderr, disable=not sys.stderr.isatty()):
            why_not = supports(DTYPES[dtype], options.head_dim, combine, capability)
            if why_not:
                left_out.append(f"{combine} {dtype}: {why_not}")
                continue
            start = time.perf_counter()
            count = warmup(device, DTYPES[dtype], options.head_dim, combine, num_heads=options.heads)
            seconds = time.perf_counter() - start
            compiled.append({"combine": combine, "dtype": dtype, "kernels": count, "seconds": seconds})
    if options.json:
        print(json.dumps({"device": str(device), "nothing_to_do": reason, "compiled": compiled, "left_out": left_out}))
        return 0
    if reason is not None:
        print(f"Nothing to compile: {reason}. The cpu and torch backends need no warming up.")
    for entry in compiled:
        print(f"{entry['combine']} {entry['dtype']}: {entry['kernels']} kernels, {entry['seconds']:.1f} s")
    for line in left_out:
        print(f"left out: {line}")
    return 0


def _device(name: str) -> str:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise invalid("--device", repr(name), "cuda, cuda:0, cuda:1 …") from error
    if device.type != "cuda":
        raise invalid("--device", repr(name), "a CUDA device; others have nothing to compile")
    if torch.cuda.is_available() and (device.index or 0) >= torch.cuda.device_count():
        raise invalid("--device", repr(name), f"cuda:0 to cuda:{torch.cuda.device_count() - 1}")
    return name
