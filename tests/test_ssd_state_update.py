"""ssd_state_update: every backend against the fp64 oracle and the scan, registration, refusals."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scan_cases import BACKENDS, DTYPES, Call, Maker, assert_close_to_oracle, copied, in_fp64

import anima_fast
from anima_fast import ssd_chunk_scan, ssd_state_update


def call(batch=2, heads=4, head_dim=16, groups=2, state_dim=8, dtype=torch.float32, **changes):
    arguments = dict(
        state=torch.randn(batch, heads, head_dim, state_dim),
        x=torch.randn(batch, heads, head_dim, dtype=dtype),
        dt=torch.rand(batch, heads, head_dim),
        A=-torch.rand(heads, head_dim, state_dim),
        B=torch.randn(batch, groups, state_dim, dtype=dtype),
        C=torch.randn(batch, groups, state_dim, dtype=dtype),
    )
    for name, change in changes.items():
        arguments[name] = change(arguments[name]) if callable(change) else change
    return arguments


def without_heads(batch=2, channels=300, state_dim=8, **changes):
    arguments = dict(
        state=torch.randn(batch, channels, state_dim),
        x=torch.randn(batch, channels),
        dt=torch.rand(batch, channels),
        A=-torch.rand(channels, state_dim),
        B=torch.randn(batch, state_dim),
        C=torch.randn(batch, state_dim),
        D=torch.randn(channels),
        z=torch.randn(batch, channels),
        dt_bias=torch.randn(channels),
        dt_softplus=True,
    )
    return {**arguments, **changes}


@st.composite
def calls(draw):
    make = Maker(draw)
    dtype, own = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(DTYPES))
    batch = draw(st.sampled_from([0, 1, 2, 5]))
    groups = draw(st.sampled_from([1, 2, 3]))
    heads = groups * draw(st.sampled_from([1, 2, 4]))
    head_dim = draw(st.sampled_from([1, 3, 8, 17, 64]))
    state_dim = draw(st.sampled_from([1, 5, 16, 31, 64, 128]))
    channels = (heads, head_dim)
    indexed = draw(st.booleans())
    slots = batch + draw(st.integers(0, 3)) if indexed else batch
    layouts = ("plain", "sliced", "last dimension apart")
    arguments = dict(
        state=make.tensor(slots, *channels, state_dim, dtype=draw(st.sampled_from(DTYPES)), layouts=layouts),
        x=make.tensor(batch, *channels, dtype=dtype),
        B=make.tensor(batch, groups, state_dim, dtype=dtype),
        C=make.tensor(batch, groups, state_dim, dtype=dtype),
        D=make.maybe(*channels, dtype=own, layouts=("plain", "last dimension apart")),
        z=make.maybe(batch, *channels, dtype=dtype),
        dt_softplus=draw(st.booleans()),
    )
    if draw(st.booleans()):  # one number a head, as Mamba2 has
        arguments.update(
            dt=make.tensor(batch, heads, 1, dtype=own, values="positive").expand(batch, *channels),
            A=make.tensor(heads, 1, 1, values="decay", layouts=("plain",)).expand(*channels, state_dim),
            dt_bias=make.tensor(heads, 1, values="positive", layouts=("plain",)).expand(channels)
            if draw(st.booleans())
            else None,
        )
    else:
        arguments.update(
            dt=make.tensor(batch, *channels, dtype=own, values="positive"),
            A=make.tensor(*channels, state_dim, values="decay", layouts=("plain", "sliced")),
            dt_bias=make.maybe(*channels, dtype=own, values="positive", layouts=("plain",)),
        )
    if indexed:
        order = torch.randperm(slots, generator=make.generator)[:batch].int()
        outside = torch.rand(batch, generator=make.generator) < 0.3
        arguments.update(state_batch_indices=torch.where(outside, draw(st.sampled_from([-1, slots, 10**6])), order))
    return Call(arguments)


@pytest.mark.parametrize("backend", BACKENDS)
@given(arguments=calls())
def test_against_the_oracle(backend, arguments):
    assert_close_to_oracle(ssd_state_update, arguments, backend, changed=("state",))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_head_and_state(backend, dtype):
    arguments = call(3, 2, 256, 1, 256, dtype=dtype)
    assert_close_to_oracle(ssd_state_update, arguments, backend, changed=("state",))


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_heads(backend):
    """Channels by the hundred, one group: Mamba1's step."""
    assert_close_to_oracle(ssd_state_update, without_heads(), backend, changed=("state",))
    with_heads = {
        n: x if n in ("x", "dt", "z") else x[:, None] if n in ("state", "B", "C") else x
        for n, x in without_heads(channels=200).items()
    }
    flat = {**with_heads, **{n: with_heads[n][:, 0].clone() for n in ("state", "B", "C")}}
    with_heads.update({n: with_heads[n][:, None] for n in ("x", "dt", "z")})
    with_heads.update({n: with_heads[n][None] for n in ("A", "D", "dt_bias")})
    out = ssd_state_update(**flat, backend=backend)
    torch.testing.assert_close(ssd_state_update(**with_heads, backend=backend)[:, 0], out, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(with_heads["state"][:, 0], flat["state"], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_token_by_token_equals_the_scan(backend):
    x, z = torch.randn(2, 2, 20, 4, 16)
    dt, A, dt_bias, D = torch.randn(2, 20, 4), -torch.rand(4), torch.randn(4), torch.randn(4)
    B, C = torch.randn(2, 2, 20, 2, 8)
    expected, last = ssd_chunk_scan(
        x, dt, A, B, C, D=D, z=z, dt_bias=dt_bias, dt_softplus=True, return_final_states=True, backend=backend
    )
    state = torch.zeros(2, 4, 16, 8)
    for t in range(20):
        out = ssd_state_update(
            state, x[:, t], dt[:, t, :, None].expand(2, 4, 16), A[:, None, None].expand(4, 16, 8), B[:, t], C[:, t],
            D[:, None].expand(4, 16), z[:, t], dt_bias[:, None].expand(4, 16), True, backend=backend,
        )  # fmt: skip
        torch.testing.assert_close(out, expected[:, t], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(state, last, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_slots(backend):
    """Rows use the slots they name; those outside give 0, and no other slot is touched."""
    arguments = call(4, state=torch.randn(6, 4, 16, 8))
    before = arguments["state"].clone()
    out = ssd_state_update(**arguments, state_batch_indices=torch.tensor([3, -1, 0, 6]), backend=backend)
    assert bool((out[[1, 3]] == 0).all()) and torch.equal(arguments["state"][[1, 2, 4, 5]], before[[1, 2, 4, 5]])
    rows = {n: x if n == "A" else x[[0, 2]] for n, x in arguments.items()}
    rows["state"] = before[[3, 0]]
    torch.testing.assert_close(out[[0, 2]], ssd_state_update(**rows, backend=backend), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(arguments["state"][[3, 0]], rows["state"], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_slot_zero_is_not_lent_to_rows_without_a_slot(backend):
    arguments = call(3, state=torch.full((2, 4, 16, 8), 7.0))
    arguments["x"][0] = math.nan
    out = ssd_state_update(**arguments, state_batch_indices=torch.tensor([-1, 0, 5]), backend=backend)
    assert bool((out[[0, 2]] == 0).all()) and bool(arguments["state"].isfinite().all())
    assert bool((arguments["state"][1] == 7).all()) and not bool((arguments["state"][0] == 7).any())
    arguments["state"].fill_(7)
    ssd_state_update(**arguments, state_batch_indices=torch.tensor([-1, 9, 5]), backend=backend)
    assert bool((arguments["state"] == 7).all())


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_state_is_updated_where_it_lies(backend):
    """A view into a cache, in its own strides and type; its neighbours stay."""
    cache = torch.full((3, 2, 4, 8, 20), 5.0, dtype=torch.bfloat16)
    arguments = call(2, state=cache[1, :, :, :, 3:11].transpose(2, 3)[..., :8], head_dim=8)
    expected = copied(arguments)
    assert_close_to_oracle(ssd_state_update, arguments, backend, changed=("state",))
    ssd_state_update(**arguments, backend=backend)
    assert not torch.equal(arguments["state"], expected["state"])
    rest = torch.ones_like(cache, dtype=torch.bool)
    rest[1, ..., 3:11] = False
    assert bool((cache[rest] == 5).all())


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays_in_its_row_and_head(backend):
    arguments = call()
    arguments["x"][0, 1, 3] = math.nan
    out = ssd_state_update(**arguments, backend=backend)
    assert bool(out[0, 1, 3].isnan()) and int(out.isnan().sum()) == 1
    assert int(arguments["state"].isnan().sum()) == 8


@pytest.mark.parametrize("backend", BACKENDS)
def test_bit_equal_on_repeat(backend):
    arguments = call(5, 8, 64, 1, 128)
    runs = [copied(arguments) for _ in range(3)]
    outs = [ssd_state_update(**run, backend=backend) for run in runs]
    for out, run in zip(outs[1:], runs[1:], strict=True):
        assert torch.equal(out, outs[0]) and torch.equal(run["state"], runs[0]["state"])


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_an_empty_batch(backend):
    assert ssd_state_update(**call(0), backend=backend).shape == (0, 4, 16)
    no_slots = call(2, state=torch.zeros(0, 4, 16, 8), state_batch_indices=torch.tensor([0, -1]))
    assert bool((ssd_state_update(**no_slots, backend=backend) == 0).all())


def test_fp64_goes_to_the_reference():
    assert "ssd_state_update: reference" in anima_fast.explain("ssd_state_update", **in_fp64(call()))
    assert ssd_state_update(**in_fp64(call())).dtype == torch.float64


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    plain = (*call().values(), None, None, None, False, None, backend)
    full = (
        *call(state=torch.randn(5, 4, 16, 8)).values(), torch.randn(4, 16), torch.randn(2, 4, 16), torch.randn(4, 16),
        True, torch.tensor([4, 1]), backend,
    )  # fmt: skip
    for arguments in (plain, full):
        torch.library.opcheck(torch.ops.anima_fast.ssd_state_update.default, arguments)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("make", [call, without_heads])
def test_torch_compile_with_dynamic_batch(backend, make):
    def layer(arguments):
        return ssd_state_update(**arguments, backend=backend) + 1

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (2, 3):
        arguments = make(batch)
        again = copied(arguments)
        torch.testing.assert_close(compiled(arguments), layer(again))
        torch.testing.assert_close(arguments["state"], again["state"])


def test_gradients_are_refused():
    for name in ("x", "state", "A"):
        arguments = call(**{name: lambda x: x.requires_grad_()})
        with pytest.raises(ValueError, match="gradients: "):
            ssd_state_update(**arguments)
        with torch.no_grad():
            ssd_state_update(**arguments)


BAD = [
    (dict(x=1), TypeError, "x: got int; allowed: a tensor"),
    (dict(x=torch.zeros(2, 1, 4, 16)), ValueError, r"x: got shape \[2, 1, 4, 16\]; allowed: \[B, H, P\] or \[B, P\]"),
    (dict(x=torch.zeros(2, 4, 16).long()), ValueError, "x: got torch.int64"),
    (dict(head_dim=257), ValueError, "x: got P = 257; allowed: P from 1 to 256"),
    (dict(head_dim=0), ValueError, "x: got P = 0"),
    (dict(x=torch.zeros(2, 0, 16)), ValueError, "x: got H = 0"),
    (dict(state=None), TypeError, "state: got NoneType"),
    (dict(state=lambda x: x[:1]), ValueError, r"state: got shape .*\[B, H, P, N\] = \[2, 4, 16, 8\]"),
    (dict(state=lambda x: x[..., :4]), ValueError, "state: got shape"),
    (dict(state=lambda x: x.int()), ValueError, "state: got torch.int32; allowed: a float type"),
    (dict(state=lambda x: x.to("meta")), ValueError, "state: got device meta"),
    (dict(state=lambda x: x[:1].expand(2, 4, 16, 8)), ValueError, "state: got an expanded tensor, strides"),
    (dict(dt=lambda x: x[..., 0]), ValueError, r"dt: got shape \[2, 4\]; allowed: \[B, H, P\] = \[2, 4, 16\]"),
    (dict(A=lambda x: x[:, :, 0]), ValueError, r"A: got shape \[4, 16\]; allowed: \[H, P, N\] = \[4, 16, 8\]"),
    (
        dict(A=torch.tensor([-1, math.nan, -1, -1])[:, None, None].expand(4, 16, 8)),
        ValueError, "A: got values that are not finite",
    ),
    (dict(groups=4, heads=2), ValueError, "B: got 4 groups for 2 heads"),
    (dict(groups=3), ValueError, "B: got 3 groups for 4 heads"),
    (dict(state_dim=257), ValueError, "B: got N = 257"),
    (dict(B=lambda x: x[0]), ValueError, r"B: got shape \[2, 8\]; allowed: \[B, G, N\]"),
    (dict(B=None), TypeError, "B: got NoneType"),
    (dict(B=lambda x: x.half()), ValueError, "B: got torch.float16"),
    (dict(C=lambda x: x[:, :1]), ValueError, "C: got shape"),
    (dict(C=lambda x: x.half()), ValueError, "C: got torch.float16"),
    (dict(D=torch.zeros(4)), ValueError, r"D: got shape \[4\]; allowed: \[H, P\]"),
    (dict(z=torch.zeros(2, 4)), ValueError, r"z: got shape \[2, 4\]"),
    (dict(z=torch.zeros(2, 4, 16).half()), ValueError, "z: got torch.float16"),
    (dict(dt_bias=torch.zeros(4)), ValueError, r"dt_bias: got shape \[4\]"),
    (dict(dt_softplus=1), TypeError, "dt_softplus: got int"),
    (dict(state_batch_indices=torch.zeros(3).int()), ValueError, r"state_batch_indices: got shape \[3\]; .*= \[2\]"),
    (dict(state_batch_indices=torch.zeros(2)), ValueError, "state_batch_indices: got torch.float32"),
    (dict(state_batch_indices=[0, 1]), TypeError, "state_batch_indices: got list"),
    (dict(backend="triton"), ValueError, "backend: got 'triton'"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "error", "message"), BAD)
def test_bad_calls_name_the_argument(changes, error, message):
    with pytest.raises(error, match=message):
        ssd_state_update(**call(**changes))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (dict(state=torch.zeros(2, 300, 4)), ValueError, r"state: got .*allowed: \[B, P, N\] = \[2, 300, 8\]"),
        (dict(A=torch.zeros(8)), ValueError, r"A: got .*allowed: \[P, N\]"),
        (dict(B=torch.zeros(2, 1, 8)), ValueError, r"B: got .*allowed: \[B, N\]"),
        (dict(B=torch.zeros(2, 300)), ValueError, "B: got N = 300"),
        (dict(D=torch.zeros(1, 300)), ValueError, r"D: got .*allowed: \[P\]"),
    ],
)
def test_bad_calls_without_heads_name_the_argument(changes, error, message):
    with pytest.raises(error, match=message):
        ssd_state_update(**without_heads(**changes))
