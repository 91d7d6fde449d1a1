"""csrc/cuda/gated_delta_rule.cu and gated_delta_step.cu, executed on the CPU, against the reference in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import simt
import torch
from against_reference import ARCHS, DTYPES, check, nan, needs_harness, run

from anima_fast.ops.cuda.gated_delta_rule import gated_delta_rule
from anima_fast.ops.cuda.gated_delta_step import gated_delta_step
from anima_fast.reference.gated_delta_rule import gated_delta_rule as reference
from anima_fast.reference.gated_delta_step import gated_delta_step as step_reference

pytestmark = needs_harness


@pytest.fixture(scope="module", params=ARCHS)
def library(request):
    return simt.build(arch=request.param)


def arguments(
    dtype: torch.dtype,
    batch: int,
    length: int,
    key_heads: int,
    value_heads: int,
    key_dim: int,
    value_dim: int,
    *,
    l2norm: bool = True,
    initial: bool = True,
    cu_seqlens: list[int] | None = None,
    decay: float = 1.0,
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Inputs, poisoned outputs and settings."""
    q, k = (torch.randn(batch, length, key_heads, key_dim) for _ in range(2))
    if not l2norm:  # longer keys make the recurrence itself unstable
        k = torch.nn.functional.normalize(k, dim=-1)
    sequences = batch if cu_seqlens is None else len(cu_seqlens) - 1
    states = (sequences, value_heads, key_dim, value_dim)
    inputs = {
        "q": q.to(dtype),
        "k": k.to(dtype),
        "v": torch.randn(batch, length, value_heads, value_dim).to(dtype),
        "g": -decay * torch.rand(batch, length, value_heads),
        "beta": torch.rand(batch, length, value_heads).to(dtype),
        "initial_state": torch.randn(states) if initial else None,
        "cu_seqlens": None if cu_seqlens is None else torch.tensor(cu_seqlens, dtype=torch.int32),
    }
    outputs = {"o": nan(batch, length, value_heads, value_dim, dtype=dtype), "final_state": nan(*states)}
    return inputs, outputs, {"scale": key_dim**-0.5, "l2norm": l2norm}


# (batch, length, key_heads, value_heads, key_dim, value_dim), options: each shape's reason
CASES = {
    "one full tile": ((1, 64, 1, 1, 64, 32), {}),
    "two chunks, partial tiles": ((1, 70, 1, 2, 100, 40), {"l2norm": False, "decay": 0.01}),
    "slices of 16, four blocks of K": ((1, 70, 1, 1, 250, 20), {}),
    "one of everything": ((1, 1, 1, 1, 1, 1), {"initial": False}),
    "no tokens": ((2, 0, 1, 1, 20, 20), {}),
    "sequences": ((1, 90, 2, 2, 7, 9), {"cu_seqlens": [0, 1, 1, 30, 64, 90], "decay": 10.0}),
    "rows that forget nothing": ((2, 130, 1, 1, 16, 8), {"decay": 1e-6, "initial": False}),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_agrees_with_the_reference(library, case, dtype):
    sizes, options = CASES[case]
    inputs, outputs, settings = arguments(dtype, *sizes, **options)
    check(library, gated_delta_rule, reference, inputs, outputs, settings | {"chunk_size": 64})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_inputs(library, dtype):
    """q, k and v sliced out of one projection, as models do; offsets break the 16-byte alignment."""
    inputs, outputs, settings = arguments(dtype, 2, 66, 2, 2, 20, 18)
    packed = torch.randn(2, 66, 2, 20 + 20 + 18 + 3).to(dtype)
    inputs["q"], inputs["k"], inputs["v"] = packed[..., 1:21], packed[..., 21:41], packed[..., 41:59]
    inputs["g"] = inputs["g"].transpose(1, 2).contiguous().transpose(1, 2)
    check(library, gated_delta_rule, reference, inputs, outputs, settings | {"chunk_size": 64})
    check(library, gated_delta_step, step_reference, inputs, outputs, settings)


def test_nan_stays_in_its_sequence(library):
    inputs, outputs, settings = arguments(torch.float32, 1, 100, 1, 1, 8, 8, cu_seqlens=[0, 20, 50, 100])
    settings["chunk_size"] = 64
    want = run(lambda **values: library.run(gated_delta_rule, **values), inputs, outputs, settings)
    inputs = {name: None if x is None else x.clone() for name, x in inputs.items()}
    for name in ("q", "k", "v", "g", "beta"):
        inputs[name][:, 20:50] = torch.nan
    got = run(lambda **values: library.run(gated_delta_rule, **values), inputs, outputs, settings)
    others = [*range(20), *range(50, 100)]
    assert got["o"][:, 20:50].isnan().all()
    assert torch.equal(got["o"][:, others], want["o"][:, others])
    assert torch.equal(got["final_state"][[0, 2]], want["final_state"][[0, 2]])


STEPS = {
    "one token": ((2, 1, 1, 2, 128, 40), {}),
    "a few tokens": ((1, 5, 1, 1, 250, 33), {"initial": False}),
    "sequences": ((1, 9, 2, 2, 60, 7), {"cu_seqlens": [0, 1, 1, 4, 9], "l2norm": False}),
    "one of everything": ((1, 1, 1, 1, 1, 1), {}),
    "no tokens": ((1, 0, 1, 1, 20, 20), {}),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", STEPS)
def test_steps_agree_with_the_reference(library, case, dtype):
    sizes, options = STEPS[case]
    check(library, gated_delta_step, step_reference, *arguments(dtype, *sizes, **options))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("l2norm", [True, False])
@pytest.mark.parametrize("sizes", [(1, 300, 1, 2, 128, 128), (1, 150, 1, 1, 256, 256)])
def test_shapes_of_models(library, dtype, sizes, l2norm):
    inputs, outputs, settings = arguments(dtype, *sizes, l2norm=l2norm, decay=0.1)
    check(library, gated_delta_rule, reference, inputs, outputs, settings | {"chunk_size": 64})
