"""causal-conv1d's names on anima_fast: signatures as recorded from the original, results against torch's conv1d."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.nn.functional as F

from anima_fast.integrations.compat.causal_conv1d import causal_conv1d_fn, causal_conv1d_update


def convolve(x, weight, bias, activation):
    """x with W - 1 tokens of history in front, in fp64."""
    bias = None if bias is None else bias.double()
    out = F.conv1d(x.double(), weight.double()[:, None], bias, groups=weight.shape[0])
    return out if activation is None else F.silu(out)


def close(got, expected):
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)


# read in Dao-AILab/causal-conv1d 0d2252d (1.6.1)
@pytest.mark.parametrize(
    "function, names, defaults",
    [
        (
            causal_conv1d_fn,
            "x weight",
            dict(bias=None, seq_idx=None, initial_states=None, return_final_states=False, final_states_out=None)
            | dict(activation=None),
        ),
        (
            causal_conv1d_update,
            "x conv_state weight",
            dict(bias=None, activation=None, cache_seqlens=None, conv_state_indices=None),
        ),
    ],
)
def test_signature(function, names, defaults):
    given = [(p.name, p.default) for p in inspect.signature(function).parameters.values()]
    assert given == [(name, inspect.Parameter.empty) for name in names.split()] + list(defaults.items())


@pytest.mark.parametrize("activation", [None, "silu", "swish"])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_fn(activation, channels_last, with_bias):
    x = torch.randn(2, 19, 24).mT if channels_last else torch.randn(2, 24, 19)
    weight, bias = torch.randn(24, 4), torch.randn(24) if with_bias else None
    close(
        causal_conv1d_fn(x, weight, bias, activation=activation), convolve(F.pad(x, (3, 0)), weight, bias, activation)
    )
    initial = torch.randn(2, 24, 3)
    kept = torch.full((2, 24, 3), torch.nan)
    out, final = causal_conv1d_fn(x, weight, bias, None, initial, True, kept, activation)
    joined = torch.cat([initial, x], dim=-1)
    close(out, convolve(joined, weight, bias, activation))
    assert final is kept or final.data_ptr() == kept.data_ptr()
    assert torch.equal(kept, joined[..., -3:])


def test_fn_packed():
    x, weight = torch.randn(1, 24, 19), torch.randn(24, 4)
    seq_idx = torch.tensor([[0] * 7 + [1] * 2 + [2] * 8 + [-1] * 2], dtype=torch.int32)
    out = causal_conv1d_fn(x, weight, seq_idx=seq_idx)
    for part in (slice(0, 7), slice(7, 9), slice(9, 17)):
        close(out[..., part], convolve(F.pad(x[..., part], (3, 0)), weight, None, None))
    assert not out[..., 17:].any(), "padding gives 0"


def test_fn_ignores_final_states_out_unless_asked():
    kept = torch.zeros(2, 8, 3)
    out = causal_conv1d_fn(torch.randn(2, 8, 5), torch.randn(8, 4), final_states_out=kept)
    assert isinstance(out, torch.Tensor) and not kept.any()


@pytest.mark.parametrize("state_length", [3, 4, 7])
@pytest.mark.parametrize("tokens", [None, 1, 3])
def test_update(state_length, tokens):
    weight, bias = torch.randn(24, 4), torch.randn(24)
    state = torch.randn(2, 24, state_length)
    x = torch.randn(2, 24) if tokens is None else torch.randn(2, 24, tokens)
    joined = torch.cat([state, x.view(2, 24, -1)], dim=-1)
    out = causal_conv1d_update(x, state, weight, bias, "silu")
    assert out.shape == x.shape
    length = tokens or 1
    close(out.view(2, 24, -1), convolve(joined, weight, bias, "silu")[..., -length:])
    assert torch.equal(state, joined[..., -state_length:])


def test_update_in_a_ring_and_a_pool():
    weight, x = torch.randn(24, 4), torch.randn(3, 24)
    pool = torch.randn(5, 24, 6)
    before = pool.clone()
    seqlens = torch.tensor([2, 0, 11], dtype=torch.int32)
    slots = torch.tensor([3, -1, 0], dtype=torch.int32)
    out = causal_conv1d_update(x, pool, weight, cache_seqlens=seqlens, conv_state_indices=slots)
    for row in (0, 2):
        slot, position = int(slots[row]), int(seqlens[row])
        history = before[slot][:, [(position - 3 + i) % 6 for i in range(3)]]
        close(out[row], (torch.cat([history, x[row, :, None]], dim=1).double() * weight.double()).sum(-1))
        assert torch.equal(pool[slot, :, position % 6], x[row])
        before[slot, :, position % 6] = x[row]
    assert not out[1].any()
    assert torch.equal(pool, before)


def test_activation_is_checked():
    with pytest.raises(ValueError, match="activation"):
        causal_conv1d_fn(torch.randn(1, 8, 5), torch.randn(8, 4), activation="gelu")
