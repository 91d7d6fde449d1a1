"""csrc/cuda/ssd_chunk_scan.cu, executed on the CPU, against the reference in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import simt
import torch
from against_reference import ARCHS, DTYPES, check, nan, needs_harness, run

from anima_fast.ops.cuda.ssd_chunk_scan import ssd_chunk_scan
from anima_fast.reference.ssd_chunk_scan import ssd_chunk_scan as reference

pytestmark = needs_harness

SETTINGS = {"chunk_size": 64, "dt_softplus": True, "dt_min": 0.0, "dt_max": float("inf")}


@pytest.fixture(scope="module", params=ARCHS)
def library(request):
    return simt.build(arch=request.param)


def arguments(
    dtype: torch.dtype,
    batch: int,
    length: int,
    heads: int,
    head_dim: int,
    groups: int,
    state_dim: int,
    *,
    D: str = "",
    z: bool = False,
    initial: bool = False,
    seq_idx: list[int] | None = None,
    cu_seqlens: list[int] | None = None,
    decay: float = 4.0,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Inputs and poisoned outputs. D is "H", "HP" or "BLH"; seq_idx gives the tokens where the next sequence begins."""
    full = (batch, length, heads, head_dim)
    skip = {
        "": lambda: None,
        "H": lambda: torch.randn(heads)[:, None],
        "HP": lambda: torch.randn(heads, head_dim),
        "BLH": lambda: torch.randn(batch, length, heads, 1, dtype=torch.float16),
    }[D]()
    index = torch.zeros(batch, length, dtype=torch.int32)
    for start in seq_idx or []:
        index[:, start:] += 1
    inputs = {
        "x": torch.randn(full).to(dtype),
        "dt": torch.randn(batch, length, heads) - 2,
        "A": -decay * torch.rand(heads) - 1e-3,
        "B": torch.randn(batch, length, groups, state_dim).to(dtype),
        "C": torch.randn(batch, length, groups, state_dim).to(dtype),
        "D": None if skip is None else skip.expand(full),
        "z": torch.randn(full).to(dtype) if z else None,
        "dt_bias": torch.randn(heads),
        "initial_state": torch.randn(batch, heads, head_dim, state_dim) if initial else None,
        "seq_idx": None if seq_idx is None else index,
        "cu_seqlens": None if cu_seqlens is None else torch.tensor(cu_seqlens, dtype=torch.int32),
    }
    outputs = {
        "y": nan(*full, dtype=dtype),
        "final_state": nan(batch, heads, head_dim, state_dim),
        "varlen_states": None if cu_seqlens is None else nan(len(cu_seqlens) - 1, heads, head_dim, state_dim),
    }
    return inputs, outputs


# (batch, length, heads, head_dim, groups, state_dim), options: each shape's reason
CASES = {
    "one full tile": ((1, 64, 1, 32, 1, 64), {}),
    "two chunks, partial tiles": ((1, 70, 2, 40, 1, 100), {"D": "H", "z": True, "initial": True}),
    "slices of 16, four blocks of N": ((1, 70, 1, 20, 1, 250), {"initial": True}),
    "one of everything": ((1, 1, 1, 1, 1, 1), {"D": "BLH", "z": True}),
    "no tokens": ((1, 0, 2, 20, 2, 20), {"initial": True, "cu_seqlens": [0, 0]}),
    "sequences": ((2, 90, 2, 7, 2, 20), {"D": "HP", "initial": True, "seq_idx": [1, 33, 34, 66, 80]}),
    "states at ends": ((1, 100, 1, 16, 1, 16), {"initial": True, "cu_seqlens": [0, 0, 30, 31, 31, 64, 100]}),
    "sequences and states": ((1, 80, 1, 9, 1, 70), {"seq_idx": [30, 65], "cu_seqlens": [0, 30, 65, 80]}),
    "slow and fast decays": ((1, 130, 2, 8, 1, 16), {"decay": 1e-4}),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_agrees_with_the_reference(library, case, dtype):
    sizes, options = CASES[case]
    check(library, ssd_chunk_scan, reference, *arguments(dtype, *sizes, **options), SETTINGS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_inputs_and_clamped_steps(library, dtype):
    """Everything sliced out of one packed tensor, as models do; offsets break the 16-byte alignment."""
    inputs, outputs = arguments(dtype, 2, 66, 2, 18, 2, 24)
    packed = torch.randn(2, 66, 2, 18 + 2 * 24 + 3).to(dtype)
    inputs["x"], inputs["B"], inputs["C"] = packed[..., 1:19], packed[..., 19:43], packed[..., 43:67]
    inputs["dt"] = inputs["dt"].to(dtype).transpose(1, 2).contiguous().transpose(1, 2)
    check(library, ssd_chunk_scan, reference, inputs, outputs, SETTINGS | {"dt_softplus": False, "dt_max": 0.1})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mixed_decays_keep_their_precision(library, dtype):
    """Tokens that forget everything beside tokens that forget nothing: differences of plain fp32 sums lose 1e-5."""
    inputs, outputs = arguments(dtype, 1, 128, 1, 8, 1, 16)
    inputs["dt"] = torch.where(torch.rand(1, 128, 1) < 0.05, 100.0, 1e-6)
    inputs["A"] = torch.tensor([-1.0])
    inputs["dt_bias"] = None
    check(library, ssd_chunk_scan, reference, inputs, outputs, SETTINGS | {"dt_softplus": False})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_stays_in_its_sequence(library, dtype):
    inputs, outputs = arguments(dtype, 1, 100, 1, 8, 1, 8, seq_idx=[20, 50, 90], cu_seqlens=[0, 20, 50, 90, 100])
    want = run(lambda **values: library.run(ssd_chunk_scan, **values), inputs, outputs, SETTINGS)
    inputs = {name: None if x is None else x.clone() for name, x in inputs.items()}
    for name in ("x", "B", "C", "dt"):
        inputs[name][:, 20:50] = torch.nan
    got = run(lambda **values: library.run(ssd_chunk_scan, **values), inputs, outputs, SETTINGS)
    others = [*range(20), *range(50, 100)]
    assert got["y"][:, 20:50].isnan().all()
    assert torch.equal(got["y"][:, others], want["y"][:, others])
    assert torch.equal(got["final_state"], want["final_state"])
    assert torch.equal(got["varlen_states"][[0, 2, 3]], want["varlen_states"][[0, 2, 3]])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(1, 300, 2, 128, 2, 64), (2, 257, 4, 64, 1, 128), (1, 200, 2, 64, 1, 256)])
def test_shapes_of_models(library, dtype, sizes):
    inputs, outputs = arguments(dtype, *sizes, D="BLH", z=True, initial=True)
    check(library, ssd_chunk_scan, reference, inputs, outputs, SETTINGS)
