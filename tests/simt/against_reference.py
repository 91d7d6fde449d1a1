"""Runs a backend function of anima_fast/ops/cuda under the harness and holds it to the error rule.

The oracle is the reference in fp64 on the same inputs, the comparison the reference in the inputs' own precision.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import simt
import torch
from error_rule import assert_error_rule

DTYPES = [torch.float32, torch.bfloat16, torch.float16]

# What multiplies depends on the architecture (csrc/cuda/fragment.cuh): sm_80 three-term TF32 and m16n8k16, sm_75 FFMA
# and m16n8k8, sm_89 FFMA and m16n8k16.
ARCHS = [80, 75, pytest.param(89, marks=pytest.mark.slow)]

needs_harness = pytest.mark.skipif(simt.available() is not None, reason=str(simt.available()))

Tensors = dict[str, torch.Tensor | None]


def nan(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.full(shape, torch.nan, dtype=dtype)


def run(function: Callable[..., None], inputs: Tensors, outputs: Tensors, settings: dict[str, Any]) -> Tensors:
    """Calls it with copies of the outputs, which it writes or updates, and gives those."""
    written = {name: None if x is None else x.clone() for name, x in outputs.items()}
    function(**inputs, **written, **settings)
    return written


def check(
    library: simt.Library,
    function: Callable[..., None],
    reference: Callable[..., None],
    inputs: Tensors,
    outputs: Tensors,
    settings: dict[str, Any],
) -> Tensors:
    """What the kernel wrote; fails where it misses the error rule."""

    def in_fp64(tensors: Tensors) -> Tensors:
        return {name: x.double() if x is not None and x.is_floating_point() else x for name, x in tensors.items()}

    got = run(functools.partial(library.run, function), inputs, outputs, settings)
    plain = run(reference, inputs, outputs, settings)
    oracle = run(reference, in_fp64(inputs), in_fp64(outputs), settings)
    shapes = {name: list(x.shape) for name, x in inputs.items() if x is not None}
    for name, x in got.items():
        if x is not None:
            exact, rounded = oracle[name], plain[name]
            assert exact is not None and rounded is not None
            assert_error_rule(x, exact, rounded, what=f"{name} of {function.__name__}{shapes}, {settings}")
    return got
