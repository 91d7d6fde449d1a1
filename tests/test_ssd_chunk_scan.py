"""ssd_chunk_scan: every backend against the fp64 oracle, invariants, the op's registration, refusals."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scan_cases import BACKENDS, DTYPES, assert_close_to_oracle, in_fp64, scan_calls, sequence_numbers

import anima_fast
from anima_fast import NoBackendError, ssd_chunk_scan


def call(batch=2, length=100, heads=4, head_dim=16, groups=2, state_dim=8, dtype=torch.float32, **changes):
    """Arguments of an ordinary call, then `changes`; functions are applied to what they change."""
    x = torch.randn(batch, length, heads, head_dim, dtype=dtype)
    arguments = dict(
        x=x,
        dt=torch.rand(batch, length, heads),
        A=-torch.rand(heads),
        B=torch.randn(batch, length, groups, state_dim, dtype=dtype),
        C=torch.randn(batch, length, groups, state_dim, dtype=dtype),
    )
    for name, change in changes.items():
        arguments[name] = change(arguments[name]) if callable(change) else change
    return arguments


def relative(out, oracle):
    return float((out.double() - oracle).abs().max() / oracle.abs().max())


@pytest.mark.parametrize("backend", BACKENDS)
@given(arguments=scan_calls())
def test_against_the_oracle(backend, arguments):
    assert_close_to_oracle(ssd_chunk_scan, arguments, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("lowest", "highest"), [(1e-6, 100), (1e-6, 1e-6), (100, 100), (1e-3, 1)])
def test_extreme_and_mixed_decays(backend, lowest, highest):
    """dt A from -1e-6 to -100 in one chunk, within 5e-6."""
    arguments = call(1, 700, 3, 16, 1, 16, A=-torch.ones(3), initial_states=torch.randn(1, 3, 16, 16))
    span = torch.rand(1, 700, 3) * math.log(highest / lowest)
    arguments.update(dt=(math.log(lowest) + span).exp(), return_final_states=True)
    expected = ssd_chunk_scan(**in_fp64(arguments), backend="reference")
    for out, oracle in zip(ssd_chunk_scan(**arguments, backend=backend), expected, strict=True):
        assert relative(out, oracle) <= 5e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_long_constant_input(backend):
    """A state that adds up 4,000 equal tokens with little decay."""
    arguments = call(1, 4000, 1, 4, 1, 8, x=torch.ones_like, B=torch.ones_like, C=torch.ones_like)
    arguments.update(dt=torch.full((1, 4000, 1), 1e-2), A=torch.tensor([-1e-2]))
    expected = ssd_chunk_scan(**in_fp64(arguments), backend="reference")
    assert relative(ssd_chunk_scan(**arguments, backend=backend), expected) <= 5e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_head_and_state(backend, dtype):
    arguments = call(1, 70, 2, 256, 1, 256, dtype=dtype, D=torch.randn(2), return_final_states=True)
    assert_close_to_oracle(ssd_chunk_scan, arguments, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@given(cut=st.integers(0, 150), split_by=st.sampled_from(["states", "seq_idx"]))
def test_a_split_anywhere_gives_the_whole(backend, cut, split_by):
    arguments = call(1, 150, initial_states=torch.randn(1, 4, 16, 8), D=torch.randn(1, 150, 4))
    if split_by == "seq_idx":
        arguments.update(seq_idx=(torch.arange(150)[None] >= 50).int())
    whole, last = ssd_chunk_scan(**arguments, return_final_states=True, backend=backend)

    def part(span, state):
        cut = dict(arguments, initial_states=state)
        cut.update({name: x[:, span] for name, x in arguments.items() if name in ("x", "dt", "B", "C", "D")})
        if split_by == "seq_idx":  # the state belongs to sequence 0
            cut.update(seq_idx=arguments["seq_idx"][:, span] - int(span.start > 50))
        return ssd_chunk_scan(**cut, return_final_states=True, backend=backend)

    first, state = part(slice(0, cut), arguments["initial_states"])
    second, state = part(slice(cut, 150), state)
    torch.testing.assert_close(torch.cat([first, second], 1), whole, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(state, last, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cuts", [[0, 120], [0, 1, 64, 65, 120], [0, 0, 30, 30, 120, 120], [0, *range(5, 121, 5)]])
def test_packed_sequences_equal_separate_calls(backend, cuts):
    cu = torch.tensor(cuts)
    arguments = call(1, 120, z=torch.randn(1, 120, 4, 16), D=torch.randn(4))
    packed, varlen = ssd_chunk_scan(
        **arguments, seq_idx=sequence_numbers(cu), cu_seqlens=cu, return_varlen_states=True, backend=backend
    )
    unreset, alone = ssd_chunk_scan(**arguments, cu_seqlens=cu, return_varlen_states=True, backend=backend)
    torch.testing.assert_close(unreset, ssd_chunk_scan(**arguments, backend=backend), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(alone, varlen, atol=0, rtol=0)
    for i, (start, end) in enumerate(itertools.pairwise(cuts)):
        one = {n: x[:, start:end] if n in ("x", "dt", "B", "C", "z") else x for n, x in arguments.items()}
        y, state = ssd_chunk_scan(**one, return_final_states=True, backend=backend)
        torch.testing.assert_close(packed[:, start:end], y, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(varlen[i], state[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("where", ["x", "dt", "B", "C", "z"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_stays_in_its_own_sequence(backend, where, value):
    """Sequences of 45 tokens in chunks of 64: the neighbours share chunks with the bad one."""
    cu = torch.tensor([0, 45, 90, 135])
    arguments = call(2, 135, heads=2, z=torch.randn(2, 135, 2, 16))
    arguments.update(z=torch.randn(2, 135, 2, 16), seq_idx=sequence_numbers(cu).expand(2, -1))
    expected, last = ssd_chunk_scan(**arguments, return_final_states=True, backend=backend)
    arguments[where][0, 60, 0] = value
    out, state = ssd_chunk_scan(**arguments, return_final_states=True, backend=backend)
    bad = ~out.isfinite()
    assert bool(bad[0, 60, 0].any()), "not hidden"
    assert not bool(bad[1].any() | bad[0, :45].any() | bad[0, 90:].any() | bad[0, :, 1].any())
    torch.testing.assert_close(out[0, 90:], expected[0, 90:], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(state, last, atol=1e-6, rtol=1e-5)
    one = {n: x[:1] if n != "A" else x for n, x in arguments.items()}
    _, varlen = ssd_chunk_scan(**one, cu_seqlens=cu, return_varlen_states=True, backend=backend)
    assert bool(varlen[[0, 2]].isfinite().all()) and bool(varlen[1, 1].isfinite().all())
    assert where in "Cz" or not bool(varlen[1, 0].isfinite().all())


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_does_not_reach_other_rows_and_heads(backend):
    arguments = call()
    arguments["x"][0, 50, 1] = math.nan
    out, state = ssd_chunk_scan(**arguments, return_final_states=True, backend=backend)
    assert bool(out[0, 50:, 1].isnan().all()) and bool(state[0, 1].isnan().all())
    out[0, :, 1], state[0, 1] = 0, 0
    assert bool(out.isfinite().all()) and bool(state.isfinite().all())


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_does_not_change_real_tokens(backend):
    """dt = 0 leaves the state alone, before and after the real tokens."""
    arguments = call()
    y, state = ssd_chunk_scan(**arguments, return_final_states=True, backend=backend)
    padded = {
        n: torch.cat([torch.rand_like(x[:, :30]), x, torch.rand_like(x[:, :41])], 1) if n != "A" else x
        for n, x in arguments.items()
    }
    padded["dt"][:, :30] = padded["dt"][:, 130:] = 0
    out, last = ssd_chunk_scan(**padded, return_final_states=True, backend=backend)
    torch.testing.assert_close(out[:, 30:130], y, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(last, state, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_chunk_size_changes_only_rounding(backend):
    arguments = call(seq_idx=torch.randint(0, 2, (2, 100)).sort(1).values, return_final_states=True)
    expected = ssd_chunk_scan(**arguments, backend=backend)
    for chunk_size in (1, 3, 16, 64, 100, 101, 10**6):
        out = ssd_chunk_scan(**arguments, chunk_size=chunk_size, backend=backend)
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bit_equal_on_repeat(backend):
    arguments = call(2, 300, return_final_states=True, seq_idx=torch.randint(0, 3, (2, 300)))
    first = ssd_chunk_scan(**arguments, backend=backend)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(ssd_chunk_scan(**arguments, backend=backend), first, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", ["H", "HP", "BLH"])
def test_forms_of_the_skip(backend, form):
    D = torch.randn({"H": (4,), "HP": (4, 16), "BLH": (2, 100, 4)}[form])
    arguments = call()
    skip = {"H": D[:, None], "HP": D, "BLH": D[..., None]}[form] * arguments["x"]
    expected = ssd_chunk_scan(**arguments, backend=backend) + skip
    torch.testing.assert_close(ssd_chunk_scan(**arguments, D=D, backend=backend), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_negative_dt_counts_as_zero_by_default_and_softplus_is_linear_above_20(backend):
    arguments = call(dt=lambda dt: dt - 0.5)
    expected = ssd_chunk_scan(**{**arguments, "dt": arguments["dt"].clamp(min=0)}, backend=backend)
    torch.testing.assert_close(ssd_chunk_scan(**arguments, backend=backend), expected, atol=0, rtol=0)
    large = call(dt=lambda dt: 21 + dt)
    out = ssd_chunk_scan(**large, dt_softplus=True, backend=backend)
    torch.testing.assert_close(out, ssd_chunk_scan(**large, backend=backend), atol=0, rtol=0)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize(("batch", "length"), [(0, 10), (2, 0), (0, 0)])
def test_empty_batches_and_no_tokens(backend, batch, length):
    initial = torch.randn(batch, 4, 16, 8)
    arguments = call(batch, length, initial_states=initial, return_final_states=True)
    y, state = ssd_chunk_scan(**arguments, backend=backend)
    assert y.shape == (batch, length, 4, 16)
    assert torch.equal(state, initial)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_tokens_in_packed_sequences(backend):
    arguments = call(1, 0, cu_seqlens=torch.tensor([0, 0, 0]), initial_states=torch.randn(1, 4, 16, 8))
    y, varlen = ssd_chunk_scan(**arguments, return_varlen_states=True, backend=backend)
    assert y.shape == (1, 0, 4, 16) and torch.equal(varlen, torch.zeros(2, 4, 16, 8))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seq_idx", [False, True])
def test_results_in_order_and_type(backend, seq_idx):
    arguments = call(1, dtype=torch.bfloat16, cu_seqlens=torch.tensor([0, 40, 100]))
    if seq_idx:
        arguments.update(seq_idx=sequence_numbers(arguments["cu_seqlens"]))
    y, final, varlen = ssd_chunk_scan(
        **arguments, return_final_states=True, return_varlen_states=True, state_dtype=torch.bfloat16, backend=backend
    )
    assert y.dtype == torch.bfloat16 and final.dtype == varlen.dtype == torch.float32
    assert y.shape == (1, 100, 4, 16) and final.shape == (1, 4, 16, 8) and varlen.shape == (2, 4, 16, 8)
    only = ssd_chunk_scan(**arguments, return_varlen_states=True, backend=backend)
    assert torch.equal(only[0], y) and torch.equal(only[1], varlen) and len(only) == 2
    assert torch.equal(ssd_chunk_scan(**arguments, backend=backend), y)


def test_fp64_goes_to_the_reference():
    arguments = in_fp64(call())
    assert "ssd_chunk_scan: reference" in anima_fast.explain("ssd_chunk_scan", **arguments)
    assert ssd_chunk_scan(**arguments).dtype == torch.float64
    with pytest.raises(NoBackendError, match="'torch' was forced .* got float64"):
        ssd_chunk_scan(**arguments, backend="torch")


def test_memory_of_the_torch_backend_is_linear_in_length():
    from torch.profiler import ProfilerActivity, profile

    peaks = []
    for length in (4096, 12288):
        arguments = call(1, length, 8, 16, 1, 16)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            ssd_chunk_scan(**arguments, backend="torch")
        level = peak = 0
        for event in profiled.profiler.kineto_results.events():
            if event.name() == "[memory]":
                level += event.nbytes()
                peak = max(peak, level)
        peaks.append(peak)
    assert peaks[1] < 3.2 * peaks[0]
    assert peaks[1] - peaks[0] < 4 * 8192 * 8 * 64, "less than a Q x Q matrix a head and chunk"


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    seq_idx, cu = sequence_numbers(torch.tensor([0, 3, 20])), torch.tensor([0, 3, 20])
    a = call(1, 20)
    tensors = (a["x"], a["dt"], a["A"], a["B"], a["C"])
    plain = (*tensors, None, None, None, None, None, None, False, 64, False, 0.0, math.inf, backend)
    skip = torch.randn(4)[:, None].expand(1, 20, 4, 16)
    full = (
        *tensors, skip, torch.randn(1, 20, 4, 16), torch.randn(4), torch.randn(1, 4, 16, 8), seq_idx, cu, True, 16,
        True, 0.0, 1.0, backend,
    )  # fmt: skip
    for arguments in (plain, full):
        torch.library.opcheck(torch.ops.anima_fast.ssd_chunk_scan.default, arguments)


@pytest.mark.parametrize("backend", BACKENDS)
def test_torch_compile_with_dynamic_length(backend):
    def layer(x, dt, A, B, C, D, cu):
        y, final, varlen = ssd_chunk_scan(
            x * 2, dt, A, B, C, 32, D, cu_seqlens=cu, dt_softplus=True, return_final_states=True,
            return_varlen_states=True, backend=backend,
        )  # fmt: skip
        return y + 1, final, varlen

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (40, 70, 129):
        arguments = [*call(1, length).values(), torch.randn(4), torch.tensor([0, 10, length])]
        torch.testing.assert_close(compiled(*arguments), layer(*arguments))


def test_gradients_are_refused():
    arguments = call(x=lambda x: x.requires_grad_())
    with pytest.raises(ValueError, match="gradients: got a tensor that requires them; allowed: inference"):
        ssd_chunk_scan(**arguments)
    raw = (*(arguments[n] for n in ("x", "dt", "A", "B", "C")), None, None, None, None, None, None, False, 64, False)
    with pytest.raises(ValueError, match="gradients: "):
        torch.ops.anima_fast.ssd_chunk_scan(*raw, 0.0, math.inf, "torch")
    with torch.no_grad():
        ssd_chunk_scan(**arguments)


def set_first(value):
    def change(x):
        x[0] = value
        return x

    return change


BAD = [
    (dict(x=[1]), TypeError, "x: got list; allowed: a tensor"),
    (dict(x=lambda x: x[0]), ValueError, r"x: got shape \[100, 4, 16\]; allowed: \[B, L, H, P\]"),
    (dict(x=lambda x: x.int()), ValueError, "x: got torch.int32; allowed: float32, float16 or bfloat16"),
    (dict(x=lambda x: x[..., :0]), ValueError, "x: got P = 0; allowed: P from 1 to 256"),
    (dict(head_dim=257), ValueError, "x: got P = 257; allowed: P from 1 to 256"),
    (dict(x=lambda x: x[:, :, :0]), ValueError, "x: got H = 0"),
    (dict(dt=None), TypeError, "dt: got NoneType"),
    (dict(dt=lambda x: x[:, 1:]), ValueError, r"dt: got shape \[2, 99, 4\]; allowed: \[B, L, H\] = \[2, 100, 4\]"),
    (dict(dt=lambda x: x.int()), ValueError, "dt: got torch.int32; allowed: a float type"),
    (dict(dt=lambda x: x.to("meta")), ValueError, "dt: got device meta; allowed: cpu"),
    (dict(A=lambda x: x[:3]), ValueError, r"A: got shape \[3\]; allowed: \[H\] = \[4\]"),
    (dict(A=set_first(math.nan)), ValueError, "A: got values that are not finite; allowed: finite numbers"),
    (dict(A=set_first(-math.inf)), ValueError, "A: got values that are not finite"),
    (dict(heads=4, groups=3), ValueError, "B: got 3 groups for 4 heads; allowed: a divisor"),
    (dict(heads=2, groups=4), ValueError, "B: got 4 groups for 2 heads; allowed: a divisor"),
    (dict(B=lambda x: x[:, :, :0]), ValueError, "B: got 0 groups"),
    (dict(state_dim=257), ValueError, "B: got N = 257; allowed: N from 1 to 256"),
    (dict(state_dim=0), ValueError, "B: got N = 0"),
    (dict(B=3), TypeError, "B: got int; allowed: a tensor"),
    (dict(B=lambda x: x[0]), ValueError, r"B: got shape \[100, 2, 8\]"),
    (dict(B=lambda x: x.half()), ValueError, "B: got torch.float16; allowed: torch.float32, as the first argument"),
    (dict(C=lambda x: x[..., :4]), ValueError, r"C: got shape \[2, 100, 2, 4\]; allowed: \[B, L, G, N\] = "),
    (dict(C=lambda x: x.bfloat16()), ValueError, "C: got torch.bfloat16"),
    (dict(C=lambda x: x.to("meta")), ValueError, "C: got device meta"),
    (dict(chunk_size=0), ValueError, "chunk_size: got 0; allowed: a whole number >= 1"),
    (dict(chunk_size=-5), ValueError, "chunk_size: got -5"),
    (dict(chunk_size=6.5), TypeError, "chunk_size: got float"),
    (dict(chunk_size=True), TypeError, "chunk_size: got bool"),
    (dict(D=torch.zeros(5)), ValueError, r"D: got shape \[5\]; allowed: \[H\] = \[4\]"),
    (dict(D=torch.zeros(4, 4)), ValueError, r"D: got shape \[4, 4\]; allowed: \[H, P\] = \[4, 16\]"),
    (dict(D=torch.zeros(2, 99, 4)), ValueError, r"D: got .*allowed: \[B, L, H\] = \[2, 100, 4\]"),
    (dict(D=torch.zeros(2, 100, 4, 16)), ValueError, r"D: got .*allowed: \[H\], \[H, P\] or \[B, L, H\]"),
    (dict(D=1.0), TypeError, "D: got float"),
    (dict(z=torch.zeros(2, 100, 4, 15)), ValueError, r"z: got shape .* = \[2, 100, 4, 16\]"),
    (dict(z=torch.zeros(2, 100, 4, 16).half()), ValueError, "z: got torch.float16"),
    (dict(dt_bias=torch.zeros(3)), ValueError, r"dt_bias: got shape \[3\]; allowed: \[H\] = \[4\]"),
    (dict(dt_bias=torch.zeros(4).int()), ValueError, "dt_bias: got torch.int32"),
    (dict(initial_states=torch.zeros(2, 4, 8, 16)), ValueError, r"initial_states: got .*= \[2, 4, 16, 8\]"),
    (dict(initial_states=torch.zeros(1, 4, 16, 8)), ValueError, "initial_states: got shape"),
    (dict(initial_states=torch.zeros(2, 4, 16, 8).long()), ValueError, "initial_states: got torch.int64"),
    (dict(seq_idx=torch.zeros(2, 99).int()), ValueError, r"seq_idx: got shape .*\[B, L\] = \[2, 100\]"),
    (dict(seq_idx=torch.zeros(2, 100)), ValueError, "seq_idx: got torch.float32; allowed: int32 or int64"),
    (dict(seq_idx=0), TypeError, "seq_idx: got int"),
    (dict(seq_idx=torch.zeros(2, 100).int().to("meta")), ValueError, "seq_idx: got device meta"),
    (dict(cu_seqlens=torch.tensor([0, 100])), ValueError, "cu_seqlens: got a batch of 2; allowed: a batch of 1"),
    (dict(batch=1, cu_seqlens=[0, 100]), TypeError, "cu_seqlens: got list"),
    (dict(batch=1, cu_seqlens=torch.tensor([0.0, 100])), ValueError, "cu_seqlens: got torch.float32"),
    (dict(batch=1, cu_seqlens=torch.tensor([[0, 100]])), ValueError, r"cu_seqlens: got shape \[1, 2\]"),
    (dict(batch=1, cu_seqlens=torch.tensor([]).int()), ValueError, r"cu_seqlens: got shape \[0\]"),
    *(
        (
            dict(batch=1, cu_seqlens=torch.tensor(values), return_varlen_states=True),
            ValueError,
            r"cu_seqlens: got \[.*\]; allowed: increasing from 0 to the length, 100",
        )
        for values in ([0, 60, 50, 100], [1, 100], [0, 50], [0, 101], [-1, 100], [0])
    ),
    (dict(return_varlen_states=True), ValueError, "return_varlen_states: got True without cu_seqlens"),
    (dict(return_final_states=1), TypeError, "return_final_states: got int; allowed: True or False"),
    (dict(dt_softplus="yes"), TypeError, "dt_softplus: got str"),
    (dict(dt_limit=(1.0, 0.5)), ValueError, r"dt_limit: got \(1.0, 0.5\); allowed: .*lowest <= highest"),
    (dict(dt_limit=(math.nan, 1.0)), ValueError, "dt_limit: got"),
    (dict(dt_limit=(0.0, math.nan)), ValueError, "dt_limit: got"),
    (dict(dt_limit=(0.0,)), ValueError, "dt_limit: got"),
    (dict(dt_limit=None), TypeError, "dt_limit: got NoneType"),
    (dict(state_dtype=torch.int32), ValueError, "state_dtype: got torch.int32"),
    (dict(backend="triton"), ValueError, "backend: got 'triton'; allowed: cpu | cuda | torch | reference"),
]


@pytest.mark.parametrize(("changes", "error", "message"), BAD)
def test_bad_calls_name_the_argument(changes, error, message):
    with pytest.raises(error, match=message):
        ssd_chunk_scan(**call(**changes))


def test_fp64_dt_next_to_fp32_x():
    arguments = call()
    out = ssd_chunk_scan(**{**arguments, "dt": arguments["dt"].double()})
    assert torch.equal(out, ssd_chunk_scan(**arguments))
