"""gated_delta_rule: every backend against the fp64 oracle, invariants, the op's registration, refusals."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scan_cases import BACKENDS, DTYPES, assert_close_to_oracle, delta_calls, in_fp64

import anima_fast
from anima_fast import NoBackendError, gated_delta_rule

BY_TOKEN = ("q", "k", "v", "g", "beta")


def call(batch=2, length=100, key_heads=2, heads=4, key_dim=16, value_dim=8, dtype=torch.float32, **changes):
    """Arguments of an ordinary call, then `changes`; functions are applied to what they change."""
    arguments = dict(
        q=torch.randn(batch, length, key_heads, key_dim, dtype=dtype),
        k=torch.randn(batch, length, key_heads, key_dim, dtype=dtype),
        v=torch.randn(batch, length, heads, value_dim, dtype=dtype),
        g=-torch.rand(batch, length, heads),
        beta=torch.rand(batch, length, heads),
        use_qk_l2norm_in_kernel=True,
        output_final_state=True,
    )
    for name, change in changes.items():
        arguments[name] = change(arguments[name]) if callable(change) else change
    return arguments


def relative(out, oracle):
    return float((out.double() - oracle).abs().max() / oracle.abs().max())


@pytest.mark.parametrize("backend", BACKENDS)
@given(arguments=delta_calls(), chunk_size=st.sampled_from([64, 64, 1, 7, 16, 128, 1000]))
def test_against_the_oracle(backend, arguments, chunk_size):
    assert_close_to_oracle(gated_delta_rule, {**arguments, "chunk_size": chunk_size}, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("lowest", "highest"), [(1e-6, 100), (1e-6, 1e-6), (100, 100), (1e-3, 1)])
def test_extreme_and_mixed_decays(backend, lowest, highest):
    arguments = call(1, 700, 2, 2, 32, 16, initial_state=torch.randn(1, 2, 32, 16))
    arguments["g"] = -(math.log(lowest) + torch.rand(1, 700, 2) * math.log(highest / lowest)).exp()
    expected = gated_delta_rule(**in_fp64(arguments), backend="reference")
    for out, oracle in zip(gated_delta_rule(**arguments, backend=backend), expected, strict=True):
        assert relative(out, oracle) <= 5e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_keys_without_decay(backend):
    """The hardest system to solve: all keys the same, beta 1, nothing forgotten."""
    arguments = call(1, 300, 1, 1, 16, 8, g=torch.zeros_like, beta=torch.ones_like)
    arguments["k"] = arguments["k"][:, :1].expand(1, 300, 1, 16)
    expected = gated_delta_rule(**in_fp64(arguments), backend="reference")
    for out, oracle in zip(gated_delta_rule(**arguments, backend=backend), expected, strict=True):
        assert relative(out, oracle) <= 5e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_heads(backend, dtype):
    assert_close_to_oracle(gated_delta_rule, call(1, 70, 1, 2, 256, 256, dtype=dtype), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@given(cut=st.integers(0, 150))
def test_a_split_anywhere_gives_the_whole(backend, cut):
    arguments = call(2, 150, initial_state=torch.randn(2, 4, 16, 8))
    whole, last = gated_delta_rule(**arguments, backend=backend)
    outs, state = [], arguments["initial_state"]
    for span in (slice(0, cut), slice(cut, 150)):
        part = {n: x[:, span] if n in BY_TOKEN else x for n, x in arguments.items()}
        out, state = gated_delta_rule(**{**part, "initial_state": state}, backend=backend)
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, 1), whole, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(state, last, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cuts", [[0, 120], [0, 1, 64, 65, 120], [0, 0, 30, 30, 120, 120], [0, *range(5, 121, 5)]])
def test_packed_sequences_equal_separate_calls(backend, cuts):
    initial = torch.randn(len(cuts) - 1, 4, 16, 8)
    arguments = call(1, 120)
    packed, states = gated_delta_rule(
        **arguments, cu_seqlens=torch.tensor(cuts), initial_state=initial, backend=backend
    )
    for i, (start, end) in enumerate(itertools.pairwise(cuts)):
        one = {n: x[:, start:end] if n in BY_TOKEN else x for n, x in arguments.items()}
        out, state = gated_delta_rule(**one, initial_state=initial[i : i + 1], backend=backend)
        torch.testing.assert_close(packed[:, start:end], out, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(states[i], state[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("where", BY_TOKEN)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_stays_in_its_own_sequence(backend, where, value):
    cu = torch.tensor([0, 45, 90, 135])
    arguments = call(1, 135, 1, 2)
    expected, last = gated_delta_rule(**arguments, cu_seqlens=cu, backend=backend)
    arguments[where][0, 60] = value
    out, states = gated_delta_rule(**arguments, cu_seqlens=cu, backend=backend)
    assert not bool(out[0, 60].isfinite().all()), "not hidden"
    kept = torch.cat([torch.arange(45), torch.arange(90, 135)])
    torch.testing.assert_close(out[0, kept], expected[0, kept], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(states[[0, 2]], last[[0, 2]], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_does_not_reach_other_rows_and_heads(backend):
    arguments = call()
    arguments["v"][0, 50, 1] = math.nan
    out, state = gated_delta_rule(**arguments, backend=backend)
    assert bool(out[0, 50:, 1].isnan().all()) and bool(state[0, 1].isnan().all())
    out[0, :, 1], state[0, 1] = 0, 0
    assert bool(out.isfinite().all()) and bool(state.isfinite().all())


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_does_not_change_real_tokens(backend):
    """beta = 0 and g = 0 leave the state alone, before and after the real tokens."""
    arguments = call()
    o, state = gated_delta_rule(**arguments, backend=backend)
    padded = {
        n: torch.cat([torch.rand_like(x[:, :30]), x, torch.rand_like(x[:, :41])], 1) if n in BY_TOKEN else x
        for n, x in arguments.items()
    }
    for name in ("g", "beta"):
        padded[name][:, :30] = padded[name][:, 130:] = 0
    out, last = gated_delta_rule(**padded, backend=backend)
    torch.testing.assert_close(out[:, 30:130], o, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(last, state, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cu_seqlens", [None, torch.tensor([0, 10, 80, 100])])
def test_chunk_size_changes_only_rounding(backend, cu_seqlens):
    arguments = call(1, cu_seqlens=cu_seqlens)
    expected = gated_delta_rule(**arguments, backend=backend)
    for chunk_size in (1, 3, 16, 64, 100, 101, 10**6):
        out = gated_delta_rule(**arguments, chunk_size=chunk_size, backend=backend)
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bit_equal_on_repeat(backend):
    arguments = call(2, 300)
    o, state = gated_delta_rule(**arguments, backend=backend)
    for _ in range(3):
        again, last = gated_delta_rule(**arguments, backend=backend)
        assert torch.equal(o, again) and torch.equal(state, last)


@pytest.mark.parametrize("backend", BACKENDS)
def test_norm_and_scale(backend):
    arguments = call(use_qk_l2norm_in_kernel=True)
    o, _ = gated_delta_rule(**arguments, backend=backend)
    unit = {n: arguments[n] * (arguments[n].square().sum(-1, keepdim=True) + 1e-6).rsqrt() for n in "qk"}
    plain = {**arguments, **unit, "use_qk_l2norm_in_kernel": False}
    torch.testing.assert_close(gated_delta_rule(**plain, backend=backend)[0], o, atol=1e-5, rtol=1e-5)
    half, _ = gated_delta_rule(**arguments, scale=0.5 * 16**-0.5, backend=backend)
    torch.testing.assert_close(2 * half, o, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize(("batch", "length"), [(0, 10), (2, 0), (0, 0)])
def test_empty_batches_and_no_tokens(backend, batch, length):
    initial = torch.randn(batch, 4, 16, 8)
    o, state = gated_delta_rule(**call(batch, length, initial_state=initial), backend=backend)
    assert o.shape == (batch, length, 4, 8) and torch.equal(state, initial)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_no_tokens_in_packed_sequences(backend):
    for cuts in ([0], [0, 0, 0]):
        initial = torch.randn(len(cuts) - 1, 4, 16, 8)
        o, state = gated_delta_rule(**call(1, 0, cu_seqlens=torch.tensor(cuts), initial_state=initial), backend=backend)
        assert o.shape == (1, 0, 4, 8) and torch.equal(state, initial)


@pytest.mark.parametrize("backend", BACKENDS)
def test_results_and_their_types(backend):
    arguments = call(dtype=torch.bfloat16)
    o, state = gated_delta_rule(**arguments, backend=backend)
    assert o.dtype == torch.bfloat16 and state.dtype == torch.float32 and state.shape == (2, 4, 16, 8)
    alone, nothing = gated_delta_rule(**{**arguments, "output_final_state": False}, backend=backend)
    assert nothing is None and torch.equal(alone, o)


def test_fp64_goes_to_the_reference():
    arguments = in_fp64(call())
    assert "gated_delta_rule: reference" in anima_fast.explain("gated_delta_rule", **arguments)
    assert gated_delta_rule(**arguments)[0].dtype == torch.float64
    with pytest.raises(NoBackendError, match="'torch' was forced .* got float64"):
        gated_delta_rule(**arguments, backend="torch")


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    tensors = tuple(call(1, 20)[n] for n in BY_TOKEN)
    plain = (*tensors, 0.25, None, False, False, None, 64, backend)
    full = (*tensors, 0.25, torch.randn(2, 4, 16, 8), True, True, torch.tensor([0, 7, 20]), 16, backend)
    for arguments in (plain, full):
        torch.library.opcheck(torch.ops.anima_fast.gated_delta_rule.default, arguments)


@pytest.mark.parametrize("backend", BACKENDS)
def test_torch_compile_with_dynamic_length(backend):
    def layer(q, k, v, g, beta, cu):
        o, state = gated_delta_rule(
            q * 2, k, v, g, beta, None, None, True, True, cu_seqlens=cu, chunk_size=32, backend=backend
        )
        return o + 1, state

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (40, 70, 129):
        arguments = [*list(call(1, length).values())[:5], torch.tensor([0, 10, length])]
        torch.testing.assert_close(compiled(*arguments), layer(*arguments))


def test_gradients_are_refused():
    arguments = call(v=lambda x: x.requires_grad_())
    with pytest.raises(ValueError, match="gradients: got a tensor that requires them; allowed: inference"):
        gated_delta_rule(**arguments)
    raw = (*(arguments[n] for n in BY_TOKEN), 0.25, None, False, False, None, 64, "torch")
    with pytest.raises(ValueError, match="gradients: "):
        torch.ops.anima_fast.gated_delta_rule(*raw)
    with torch.no_grad():
        gated_delta_rule(**arguments)


# Without chunk_size, these are gated_delta_step's too.
BAD = [
    (dict(q="q"), TypeError, "q: got str; allowed: a tensor"),
    (dict(q=lambda x: x[0]), ValueError, r"q: got shape \[100, 2, 16\]; allowed: \[B, L, Hk, K\]"),
    (dict(q=lambda x: x.int()), ValueError, "q: got torch.int32"),
    (dict(key_dim=257), ValueError, "q: got K = 257; allowed: K from 1 to 256"),
    (dict(key_dim=0), ValueError, "q: got K = 0"),
    (dict(key_heads=3), ValueError, "q: got 3 heads for 4 heads of v; allowed: a divisor"),
    (dict(key_heads=8), ValueError, "q: got 8 heads for 4 heads of v"),
    (dict(key_heads=0), ValueError, "q: got 0 heads"),
    (dict(k=lambda x: x[:, :, :1]), ValueError, r"k: got shape .*\[B, L, Hk, K\] = \[2, 100, 2, 16\]"),
    (dict(k=lambda x: x.half()), ValueError, "k: got torch.float16; allowed: torch.float32, as the first argument"),
    (dict(k=lambda x: x.to("meta")), ValueError, "k: got device meta"),
    (dict(v=None), TypeError, "v: got NoneType"),
    (dict(v=lambda x: x[0]), ValueError, r"v: got shape \[100, 4, 8\]"),
    (dict(v=lambda x: x[:, 1:]), ValueError, r"v: got shape \[2, 99, 4, 8\]"),
    (dict(v=lambda x: x.half()), ValueError, "v: got torch.float16"),
    (dict(value_dim=257), ValueError, "v: got V = 257"),
    (dict(value_dim=0), ValueError, "v: got V = 0"),
    (dict(heads=0), ValueError, "v: got Hv = 0"),
    (dict(g=lambda x: x[..., :2]), ValueError, r"g: got shape \[2, 100, 2\]; allowed: \[B, L, Hv\] = \[2, 100, 4\]"),
    (dict(g=lambda x: x.long()), ValueError, "g: got torch.int64; allowed: a float type"),
    (dict(g=None), TypeError, "g: got NoneType"),
    (dict(beta=lambda x: x[:, :9]), ValueError, r"beta: got shape \[2, 9, 4\]"),
    (dict(beta=lambda x: x > 0), ValueError, "beta: got torch.bool"),
    (dict(scale=math.inf), ValueError, "scale: got inf; allowed: None or a finite number"),
    (dict(scale=math.nan), ValueError, "scale: got nan"),
    (dict(scale="1"), TypeError, "scale: got str"),
    (dict(initial_state=torch.zeros(2, 2, 16, 8)), ValueError, r"initial_state: got .*\[B, Hv, K, V\] = \[2, 4, 16, "),
    (dict(initial_state=torch.zeros(2, 4, 8, 16)), ValueError, "initial_state: got shape"),
    (dict(initial_state=torch.zeros(2, 4, 16, 8).int()), ValueError, "initial_state: got torch.int32"),
    (dict(output_final_state=1), TypeError, "output_final_state: got int"),
    (dict(use_qk_l2norm_in_kernel=None), TypeError, "use_qk_l2norm_in_kernel: got NoneType"),
    (dict(cu_seqlens=torch.tensor([0, 100])), ValueError, "cu_seqlens: got a batch of 2; allowed: a batch of 1"),
    (dict(batch=1, cu_seqlens=[0, 100]), TypeError, "cu_seqlens: got list"),
    (dict(batch=1, cu_seqlens=torch.tensor([0.0, 100])), ValueError, "cu_seqlens: got torch.float32"),
    (dict(batch=1, cu_seqlens=torch.tensor(100)), ValueError, r"cu_seqlens: got shape \[\]"),
    *(
        (dict(batch=1, cu_seqlens=torch.tensor(values)), ValueError, r"cu_seqlens: got .* from 0 to the length, 100")
        for values in ([0, 60, 50, 100], [1, 100], [0, 50], [0, 101], [-1, 100], [0])
    ),
    (
        dict(batch=1, cu_seqlens=torch.tensor([0, 50, 100]), initial_state=torch.zeros(1, 4, 16, 8)),
        ValueError, r"initial_state: got .*\[sequences, Hv, K, V\] = \[2, 4, 16, 8\]",
    ),
    (dict(backend="triton"), ValueError, "backend: got 'triton'; allowed: cpu | cuda | torch | reference"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        *BAD,
        (dict(chunk_size=0), ValueError, "chunk_size: got 0; allowed: a whole number >= 1"),
        (dict(chunk_size=2.0), TypeError, "chunk_size: got float"),
    ],
)
def test_bad_calls_name_the_argument(changes, error, message):
    with pytest.raises(error, match=message):
        gated_delta_rule(**call(**changes))
