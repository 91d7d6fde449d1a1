"""csrc/cuda/ssd_state_update.cu, executed on the CPU, against the reference in fp64."""

from __future__ import annotations

import pytest
import simt
import torch
from against_reference import DTYPES, check, nan, needs_harness

from anima_fast.ops.cuda.ssd_state_update import ssd_state_update
from anima_fast.reference.ssd_state_update import ssd_state_update as reference

pytestmark = needs_harness


@pytest.fixture(scope="module")
def library():
    return simt.build()


@pytest.mark.parametrize("state_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1, 1), (2, 4, 9, 2, 70)])
def test_agrees_with_the_reference(library, sizes, everything, dtype, state_dtype):
    """With everything: an A of one number a head, slots (one of them outside), permuted and expanded tensors."""
    batch, heads, head_dim, groups, state_dim = sizes
    inputs = {
        "x": torch.randn(batch, heads, head_dim).to(dtype),
        "dt": torch.rand(batch, heads, head_dim),
        "A": -torch.rand(heads, head_dim, state_dim),
        "B": torch.randn(batch, groups, state_dim).to(dtype),
        "C": torch.randn(batch, groups, state_dim).to(dtype),
        "D": None,
        "z": None,
        "dt_bias": None,
        "state_indices": None,
    }
    state = torch.randn(batch, heads, head_dim, state_dim).to(state_dtype)
    if everything:
        inputs |= {
            "x": torch.randn(batch, head_dim, heads).to(dtype).transpose(1, 2),
            "dt": torch.randn(batch, heads, 1).to(dtype).expand(batch, heads, head_dim),
            "A": -torch.rand(heads, 1, 1).expand(heads, head_dim, state_dim),
            "D": torch.randn(heads, head_dim).to(state_dtype),
            "z": torch.randn(batch, heads, head_dim).to(dtype),
            "dt_bias": torch.randn(heads, 1).expand(heads, head_dim),
            "state_indices": torch.tensor([2, -1][:batch], dtype=torch.int32),
        }
        state = torch.randn(3, state_dim, heads, head_dim).to(state_dtype).permute(0, 2, 3, 1)
    outputs = {"state": state, "out": nan(batch, heads, head_dim, dtype=dtype)}
    check(library, ssd_state_update, reference, inputs, outputs, {"dt_softplus": everything})
