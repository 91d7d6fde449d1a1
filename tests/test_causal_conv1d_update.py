"""causal_conv1d_update: every backend against the fp64 oracle and causal_conv1d, registration, refusals."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scan_cases import BACKENDS, DTYPES, Call, Maker, assert_close_to_oracle, copied, in_fp64
from test_causal_conv1d import BAD

import anima_fast
from anima_fast import causal_conv1d, causal_conv1d_update


def call(batch=2, channels=24, length=1, width=4, size=5, dtype=torch.float32, **changes):
    arguments = dict(
        x=torch.randn(batch, channels, length, dtype=dtype),
        conv_state=torch.randn(batch, channels, size, dtype=dtype),
        weight=torch.randn(channels, width),
    )
    for name, change in changes.items():
        arguments[name] = change(arguments[name]) if callable(change) else change
    return arguments


@st.composite
def calls(draw):
    make = Maker(draw)
    dtype, own = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(DTYPES))
    batch = draw(st.sampled_from([0, 1, 2, 5]))
    channels = draw(st.sampled_from([1, 3, 8, 24, 33, 130]))
    length = draw(st.sampled_from([None, None, 1, 1, 2, 3, 6, 9]))
    width = draw(st.sampled_from([1, 2, 3, 4, 4, 9]))
    size = max(width - 1, 1) + draw(st.sampled_from([0, 0, 1, 5]))
    indexed = draw(st.booleans())
    slots = batch + draw(st.integers(0, 3)) if indexed else batch
    shape = (batch, channels) if length is None else (batch, channels, length)
    layouts = ("plain", "sliced", "last dimension apart")
    arguments = dict(
        x=make.tensor(*shape, dtype=dtype),
        conv_state=make.tensor(slots, channels, size, dtype=dtype, layouts=layouts),
        weight=make.tensor(channels, width, dtype=own),
        bias=make.maybe(channels, dtype=own, layouts=("plain",)),
        activation=draw(st.sampled_from([None, "silu", "swish"])),
    )
    if draw(st.booleans()):
        arguments.update(cache_seqlens=torch.randint(-3, 40, (batch,), generator=make.generator))
    if indexed:
        order = torch.randperm(slots, generator=make.generator)[:batch].int()
        outside = torch.rand(batch, generator=make.generator) < 0.3
        arguments.update(conv_state_indices=torch.where(outside, draw(st.sampled_from([-1, slots, 10**6])), order))
    return Call(arguments)


@pytest.mark.parametrize("backend", BACKENDS)
@given(arguments=calls())
def test_against_the_oracle(backend, arguments):
    assert_close_to_oracle(causal_conv1d_update, arguments, backend, changed=("conv_state",))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ring", [False, True])
@pytest.mark.parametrize("sizes", [[1] * 20, [3, 1, 7, 9], [20]])
def test_token_by_token_equals_the_whole(backend, ring, sizes):
    x, weight, bias = torch.randn(2, 24, 20), torch.randn(24, 4), torch.randn(24)
    expected = causal_conv1d(x, weight, bias, activation="silu", backend=backend)
    state = torch.zeros(2, 24, 6)
    outs, done = [], 0
    for size in sizes:
        position = torch.full((2,), done, dtype=torch.int32) if ring else None
        part = x[:, :, done : done + size]
        outs.append(causal_conv1d_update(part, state, weight, bias, "silu", position, backend=backend))
        done += size
    torch.testing.assert_close(torch.cat(outs, 2), expected, atol=1e-6, rtol=1e-6)
    last = torch.stack([x[..., t] for t in ([18, 19, 14, 15, 16, 17] if ring else range(14, 20))], 2)
    assert torch.equal(state, last)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ring", [None, torch.tensor([0, 7, 3, 5])])
def test_slots(backend, ring):
    """Rows use the slots they name; those outside give 0, and no other slot is touched."""
    arguments = call(4, conv_state=torch.randn(6, 24, 5), cache_seqlens=ring)
    arguments["x"][1] = math.nan
    before = arguments["conv_state"].clone()
    out = causal_conv1d_update(**arguments, conv_state_indices=torch.tensor([3, -1, 0, 6]), backend=backend)
    state = arguments["conv_state"]
    assert bool((out[[1, 3]] == 0).all()) and torch.equal(state[[1, 2, 4, 5]], before[[1, 2, 4, 5]])
    rows = dict(arguments, x=arguments["x"][[0, 2]], conv_state=before[[3, 0]])
    rows.update(cache_seqlens=None if ring is None else ring[[0, 2]])
    torch.testing.assert_close(out[[0, 2]], causal_conv1d_update(**rows, backend=backend), atol=1e-6, rtol=1e-6)
    assert torch.equal(state[[3, 0]], rows["conv_state"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_row_has_a_slot(backend):
    arguments = call(2, conv_state=torch.full((3, 24, 5), 7.0))
    out = causal_conv1d_update(**arguments, conv_state_indices=torch.tensor([-1, 3]), backend=backend)
    assert bool((out == 0).all()) and bool((arguments["conv_state"] == 7).all())


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_state_is_updated_where_it_lies(backend):
    """A view into a cache kept channels last; its neighbours stay."""
    cache = torch.full((3, 2, 7, 24), 5.0)
    arguments = call(2, conv_state=cache[1, :, 1:6].transpose(1, 2))
    again = copied(arguments)
    causal_conv1d_update(**arguments, backend=backend)
    assert_close_to_oracle(causal_conv1d_update, again, backend, changed=("conv_state",))
    assert torch.equal(cache[1, :, 5], arguments["x"][..., 0])
    cache[1, :, 1:6] = 5
    assert bool((cache == 5).all())


@pytest.mark.parametrize("backend", BACKENDS)
def test_bit_equal_on_repeat(backend):
    arguments = call(3, 300, 2)
    runs = [copied(arguments) for _ in range(3)]
    outs = [causal_conv1d_update(**run, backend=backend) for run in runs]
    for out, run in zip(outs[1:], runs[1:], strict=True):
        assert torch.equal(out, outs[0]) and torch.equal(run["conv_state"], runs[0]["conv_state"])


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_empty_batches_and_no_tokens(backend):
    assert causal_conv1d_update(**call(0), backend=backend).shape == (0, 24, 1)
    arguments = call(length=0)
    before = arguments["conv_state"].clone()
    assert causal_conv1d_update(**arguments, backend=backend).shape == (2, 24, 0)
    assert torch.equal(arguments["conv_state"], before)
    no_slots = call(2, conv_state=torch.zeros(0, 24, 5), conv_state_indices=torch.tensor([0, -1]))
    assert bool((causal_conv1d_update(**no_slots, backend=backend) == 0).all())


def test_fp64_goes_to_the_reference():
    assert "causal_conv1d_update: reference" in anima_fast.explain("causal_conv1d_update", **in_fp64(call()))
    assert causal_conv1d_update(**in_fp64(call())).dtype == torch.float64


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    x, state, weight = call().values()
    numbers = torch.tensor([1, 0])
    for arguments in (
        (x, state, weight, None, False, None, None, backend),
        (x, state, weight, torch.randn(24), True, numbers, numbers, backend),
    ):
        torch.library.opcheck(torch.ops.anima_fast.causal_conv1d_update.default, arguments)


@pytest.mark.parametrize("backend", BACKENDS)
def test_torch_compile_with_dynamic_batch(backend):
    def layer(x, state, weight):
        return causal_conv1d_update(x * 2, state, weight, None, "silu", backend=backend) + 1

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (2, 3, 5):
        x, state, weight = torch.randn(batch, 24), torch.randn(batch, 24, 4), torch.randn(24, 4)
        again = state.clone()
        torch.testing.assert_close(compiled(x, state, weight), layer(x, again, weight))
        assert torch.equal(state, again)


def test_gradients_are_refused():
    arguments = call(conv_state=lambda x: x.requires_grad_())
    with pytest.raises(ValueError, match="gradients: "):
        causal_conv1d_update(**arguments)
    with torch.no_grad():
        causal_conv1d_update(**arguments)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        *BAD,
        (dict(x=lambda x: x[0, 0]), ValueError, r"x: got shape \[1\]; allowed: \[B, C\] or \[B, C, T\]"),
        (dict(conv_state=None), TypeError, "conv_state: got NoneType"),
        (dict(conv_state=lambda x: x[0]), ValueError, r"conv_state: got shape \[24, 5\]; allowed: \[B, C, S\]"),
        (dict(conv_state=lambda x: x[:1]), ValueError, r"conv_state: got .*\[B, C, S\] = \[2, 24, 5\]"),
        (dict(conv_state=lambda x: x[:, 1:]), ValueError, r"conv_state: got shape \[2, 23, 5\]"),
        (dict(conv_state=lambda x: x.half()), ValueError, "conv_state: got torch.float16; allowed: torch.float32"),
        (dict(conv_state=lambda x: x.to("meta")), ValueError, "conv_state: got device meta"),
        (dict(size=2), ValueError, "conv_state: got S = 2 for W = 4; allowed: S >= 3"),
        (dict(size=0, width=1), ValueError, "conv_state: got S = 0 for W = 1; allowed: S >= 1"),
        (dict(conv_state=lambda x: x[:1].expand(2, 24, 5)), ValueError, "conv_state: got an expanded tensor"),
        (dict(cache_seqlens=torch.zeros(3).int()), ValueError, r"cache_seqlens: got shape \[3\]; .*\[B\] = \[2\]"),
        (dict(cache_seqlens=torch.zeros(2)), ValueError, "cache_seqlens: got torch.float32"),
        (dict(cache_seqlens=3), TypeError, "cache_seqlens: got int"),
        (dict(conv_state_indices=torch.zeros(1).int()), ValueError, r"conv_state_indices: got shape \[1\]"),
        (dict(conv_state_indices=torch.zeros(2)), ValueError, "conv_state_indices: got torch.float32"),
        (dict(conv_state_indices=[0, 1]), TypeError, "conv_state_indices: got list"),
    ],
)
def test_bad_calls_name_the_argument(changes, error, message):
    with pytest.raises(error, match=message):
        causal_conv1d_update(**call(**changes))
