"""gated_delta_step: every backend against the fp64 oracle and gated_delta_rule, registration, refusals."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from scan_cases import BACKENDS, DTYPES, assert_close_to_oracle, delta_calls, in_fp64
from test_gated_delta_rule import BAD, BY_TOKEN, call

import anima_fast
from anima_fast import gated_delta_rule, gated_delta_step


@pytest.mark.parametrize("backend", BACKENDS)
@given(arguments=delta_calls(lengths=(0, 1, 1, 1, 2, 5, 30)))
def test_against_the_oracle(backend, arguments):
    assert_close_to_oracle(gated_delta_step, arguments, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_heads(backend, dtype):
    assert_close_to_oracle(gated_delta_step, call(2, 3, 1, 2, 256, 256, dtype=dtype), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_token_at_a_time_equals_the_chunked_rule(backend):
    arguments = call(2, 40, initial_state=torch.randn(2, 4, 16, 8))
    expected, last = gated_delta_rule(**arguments, backend=backend)
    state = arguments["initial_state"].clone()
    for t in range(40):
        token = {n: x[:, t : t + 1] if n in BY_TOKEN else x for n, x in arguments.items()}
        given = state.clone()
        out, new = gated_delta_step(**{**token, "initial_state": state}, backend=backend)
        assert torch.equal(state, given), "the initial state is only read"
        torch.testing.assert_close(out, expected[:, t : t + 1], atol=1e-5, rtol=1e-5)
        state = new
    torch.testing.assert_close(state, last, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cuts", [[0, 30], [0, 0, 7, 7, 30, 30], list(range(31))])
def test_packed_sequences_equal_the_chunked_rule(backend, cuts):
    arguments = call(1, 30, cu_seqlens=torch.tensor(cuts), initial_state=torch.randn(len(cuts) - 1, 4, 16, 8))
    expected = gated_delta_rule(**arguments, backend=backend)
    out = gated_delta_step(**arguments, backend=backend)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("where", BY_TOKEN)
def test_nan_stays_in_its_own_sequence(backend, where):
    cu = torch.tensor([0, 4, 8, 12])
    arguments = call(1, 12, 1, 2)
    expected, last = gated_delta_step(**arguments, cu_seqlens=cu, backend=backend)
    arguments[where][0, 5] = math.nan
    out, states = gated_delta_step(**arguments, cu_seqlens=cu, backend=backend)
    assert bool(out[0, 5].isnan().any()), "not hidden"
    kept = [0, 1, 2, 3, 4, 8, 9, 10, 11]
    assert torch.equal(out[0, kept], expected[0, kept]) and torch.equal(states[[0, 2]], last[[0, 2]])


@pytest.mark.parametrize("backend", BACKENDS)
def test_bit_equal_on_repeat(backend):
    arguments = call(3, 2, 4, 8, 128, 128)
    o, state = gated_delta_step(**arguments, backend=backend)
    for _ in range(3):
        again, last = gated_delta_step(**arguments, backend=backend)
        assert torch.equal(o, again) and torch.equal(state, last)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize(("batch", "length"), [(0, 1), (2, 0), (0, 0)])
def test_empty_batches_and_no_tokens(backend, batch, length):
    initial = torch.randn(batch, 4, 16, 8)
    o, state = gated_delta_step(**call(batch, length, initial_state=initial), backend=backend)
    assert o.shape == (batch, length, 4, 8) and torch.equal(state, initial)


def test_fp64_goes_to_the_reference():
    arguments = in_fp64(call(length=3))
    assert "gated_delta_step: reference" in anima_fast.explain("gated_delta_step", **arguments)
    assert gated_delta_step(**arguments)[0].dtype == torch.float64


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    tensors = tuple(call(1, 4)[n] for n in BY_TOKEN)
    plain = (*tensors, 0.25, None, False, False, None, backend)
    full = (*tensors, 0.25, torch.randn(2, 4, 16, 8), True, True, torch.tensor([0, 1, 4]), backend)
    for arguments in (plain, full):
        torch.library.opcheck(torch.ops.anima_fast.gated_delta_step.default, arguments)


@pytest.mark.parametrize("backend", BACKENDS)
def test_torch_compile_with_dynamic_length(backend):
    def layer(q, k, v, g, beta, state):
        o, state = gated_delta_step(q * 2, k, v, g, beta, None, state, True, True, backend=backend)
        return o + 1, state

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (2, 3, 5):
        arguments = [*list(call(2, length).values())[:5], torch.randn(2, 4, 16, 8)]
        torch.testing.assert_close(compiled(*arguments), layer(*arguments))


def test_gradients_are_refused():
    arguments = call(length=1, v=lambda x: x.requires_grad_())
    with pytest.raises(ValueError, match="gradients: "):
        gated_delta_step(**arguments)
    raw = (*(arguments[n] for n in BY_TOKEN), 0.25, None, False, False, None, "torch")
    with pytest.raises(ValueError, match="gradients: "):
        torch.ops.anima_fast.gated_delta_step(*raw)


@pytest.mark.parametrize(("changes", "error", "message"), BAD)
def test_bad_calls_name_the_argument(changes, error, message):
    with pytest.raises(error, match=message):
        gated_delta_step(**call(**changes))
