"""csrc/cuda/causal_conv1d.cu, executed on the CPU, against the reference in fp64."""

from __future__ import annotations

import pytest
import simt
import torch
from against_reference import DTYPES, check, nan, needs_harness

from anima_fast.ops.cuda.causal_conv1d import causal_conv1d
from anima_fast.ops.cuda.causal_conv1d_update import causal_conv1d_update
from anima_fast.reference.causal_conv1d import causal_conv1d as reference
from anima_fast.reference.causal_conv1d_update import causal_conv1d_update as update_reference

pytestmark = needs_harness


@pytest.fixture(scope="module")
def library():
    return simt.build()


def layout(x: torch.Tensor, channels_last: bool) -> torch.Tensor:
    """x [B, C, T] with its channels contiguous, or its tokens."""
    return x.transpose(1, 2).contiguous().transpose(1, 2) if channels_last else x.contiguous()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("start", ["none", "initial_states", "seq_idx"])
@pytest.mark.parametrize("sizes", [(2, 40, 35, 4), (1, 3, 2, 4), (1, 5, 0, 2), (1, 2, 9, 1)])
def test_agrees_with_the_reference(library, sizes, start, channels_last, dtype):
    batch, channels, length, width = sizes
    seq_idx = torch.tensor([[-1] + [t * 4 // max(length, 1) for t in range(1, length)]] * batch, dtype=torch.int32)
    inputs = {
        "x": layout(torch.randn(batch, channels, length).to(dtype), channels_last),
        "weight": torch.randn(channels, width),
        "bias": None if start == "none" else torch.randn(channels).to(dtype),
        "initial_states": torch.randn(batch, channels, width - 1).to(dtype) if start == "initial_states" else None,
        "seq_idx": seq_idx[:, :length].contiguous() if start == "seq_idx" else None,
    }
    outputs = {
        "out": layout(nan(batch, channels, length, dtype=dtype), channels_last),
        "final_states": nan(batch, channels, width - 1, dtype=dtype) if start != "seq_idx" else None,
    }
    check(library, causal_conv1d, reference, inputs, outputs, {"silu": start != "none"})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ring", [False, True])
@pytest.mark.parametrize("slots", [False, True])
@pytest.mark.parametrize("sizes", [(2, 5, 1, 4, 3), (2, 300, 3, 4, 6), (1, 2, 7, 3, 4), (1, 2, 2, 1, 1)])
def test_update_agrees_with_the_reference(library, sizes, slots, ring, dtype):
    batch, channels, length, width, size = sizes
    inputs = {
        "x": layout(torch.randn(batch, channels, length).to(dtype), slots),
        "weight": torch.randn(channels, width).to(dtype),
        "bias": torch.randn(channels) if slots else None,
        "cache_seqlens": torch.tensor([2, 11][:batch], dtype=torch.int32) if ring else None,
        "state_indices": torch.tensor([2, 3][:batch], dtype=torch.int32) if slots else None,
    }
    outputs = {
        "conv_state": layout(torch.randn(3 if slots else batch, channels, size).to(dtype), slots),
        "out": nan(batch, channels, length, dtype=dtype),
    }
    check(library, causal_conv1d_update, update_reference, inputs, outputs, {"silu": slots})
