"""fla's names on anima_fast: signatures as recorded from the original, results against the fp64 reference."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.nn.functional as F

import anima_fast
from anima_fast.integrations.compat.fla import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule

FUNCTIONS = [chunk_gated_delta_rule, fused_recurrent_gated_delta_rule]


# read in fla-org/flash-linear-attention bc3b101 (0.5.2)
@pytest.mark.parametrize(
    "function, names, defaults",
    [
        (
            chunk_gated_delta_rule,
            "q k v g beta",
            dict(scale=None, initial_state=None, output_final_state=False, use_qk_l2norm_in_kernel=False)
            | dict(use_beta_sigmoid_in_kernel=False, allow_neg_eigval=False, state_v_first=False)
            | dict(cu_seqlens=None, cu_seqlens_cpu=None, chunk_indices=None, cp_context=None),
        ),
        (
            fused_recurrent_gated_delta_rule,
            "q k v",
            dict(g=None, gk=None, gv=None, beta=None, scale=None, initial_state=None, output_final_state=False)
            | dict(use_qk_l2norm_in_kernel=False, use_gate_in_kernel=False, A_log=None, dt_bias=None)
            | dict(use_beta_sigmoid_in_kernel=False, allow_neg_eigval=False, state_v_first=False, cu_seqlens=None),
        ),
    ],
)
def test_signature(function, names, defaults):
    *parameters, last = inspect.signature(function).parameters.values()
    empty = inspect.Parameter.empty
    assert [(p.name, p.default) for p in parameters] == [(n, empty) for n in names.split()] + list(defaults.items())
    assert last.kind is last.VAR_KEYWORD


def inputs(batch=2, length=21, key_heads=2, value_heads=4, K=8, V=16, sequences=None):
    return dict(
        q=torch.randn(batch, length, key_heads, K),
        k=torch.randn(batch, length, key_heads, K) * 0.3,
        v=torch.randn(batch, length, value_heads, V),
        g=-torch.rand(batch, length, value_heads),
        beta=torch.rand(batch, length, value_heads),
        initial_state=torch.randn(sequences or batch, value_heads, K, V),
    )


def expect(given: dict, o, final, tolerance=1e-5, **options):
    """The two results against `gated_delta_rule` in fp64."""
    wide = {name: t.double() for name, t in given.items()}
    results = anima_fast.gated_delta_rule(**wide, output_final_state=True, backend="reference", **options)
    for got, expected in zip((o, final), results, strict=True):
        error = (got.double() - expected).abs().max() / expected.abs().max()
        assert error <= tolerance, f"relative error {error:.3g} at shape {list(got.shape)}"


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("l2norm", [False, True])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_plain(function, l2norm, scale):
    given = inputs()
    o, final = function(**given, scale=scale, output_final_state=True, use_qk_l2norm_in_kernel=l2norm)
    expect(given, o, final, scale=scale, use_qk_l2norm_in_kernel=l2norm)
    assert function(**given)[1] is None


@pytest.mark.parametrize("function", FUNCTIONS)
def test_positional_order(function):
    given = inputs()
    q, k, v, g, beta, state = given.values()
    if function is chunk_gated_delta_rule:
        o, final = function(q, k, v, g, beta, 0.5, state, True, True)
    else:
        o, final = function(q, k, v, g, None, None, beta, 0.5, state, True, True)
    expect(given, o, final, scale=0.5, use_qk_l2norm_in_kernel=True)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_gate_and_beta_in_kernel(function):
    given = inputs()
    raw, logits = torch.randn_like(given["g"]), torch.randn_like(given["beta"])
    A_log, dt_bias = torch.randn(4), torch.randn(4)
    o, final = function(
        **(given | dict(g=raw, beta=logits)),
        output_final_state=True,
        use_gate_in_kernel=True,
        A_log=A_log,
        dt_bias=dt_bias,
        use_beta_sigmoid_in_kernel=True,
        allow_neg_eigval=True,
    )
    decay = -A_log.double().exp() * F.softplus(raw.double() + dt_bias.double())
    expect(given | dict(g=decay, beta=2 * logits.double().sigmoid()), o, final)
    o, final = function(**(given | dict(g=raw)), output_final_state=True, use_gate_in_kernel=True, A_log=A_log)
    expect(given | dict(g=-A_log.double().exp() * F.softplus(raw.double())), o, final)
    # Without the flags, A_log and dt_bias do not count.
    o, final = function(**given, output_final_state=True, A_log=A_log, dt_bias=dt_bias)
    expect(given, o, final)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("flag", ["state_v_first", "transpose_state_layout"])
def test_state_v_first(function, flag):
    given = inputs()
    turned = given | dict(initial_state=given["initial_state"].mT.contiguous())
    o, final = function(**turned, output_final_state=True, **{flag: True})
    assert final.shape == (2, 4, 16, 8) and final.is_contiguous()
    expect(given, o, final.mT)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_packed(function):
    given = inputs(batch=1, length=30, sequences=3)
    bounds = torch.tensor([0, 4, 5, 30])
    hints = dict(cu_seqlens_cpu=bounds, chunk_indices=torch.zeros(1, 2)) if function is FUNCTIONS[0] else {}
    o, final = function(**given, output_final_state=True, cu_seqlens=bounds, **hints)
    for i, (start, end) in enumerate([(0, 4), (4, 5), (5, 30)]):
        alone = {name: t[:, start:end] for name, t in given.items() if name != "initial_state"}
        expect(alone | dict(initial_state=given["initial_state"][i : i + 1]), o[:, start:end], final[i : i + 1])


def test_recurrent_without_decay_and_beta():
    given = inputs()
    q, k, v = given["q"], given["k"], given["v"]
    o, final = fused_recurrent_gated_delta_rule(q, k, v, output_final_state=True)
    ones = torch.ones_like(given["g"])
    expect(dict(q=q, k=k, v=v, g=0 * ones, beta=ones), o, final)


def test_chunk_size():
    given = inputs()
    for size in (16, 32):
        o, final = chunk_gated_delta_rule(**given, output_final_state=True, chunk_size=size)
        expect(given, o, final)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(
    "change, error, named",
    [
        (dict(head_first=False), ValueError, "head_first"),
        (dict(state_v_first=True, transpose_state_layout=True), ValueError, "transpose_state_layout"),
        (dict(allow_neg_eigval=True), ValueError, "allow_neg_eigval"),
        (dict(use_gate_in_kernel=True), ValueError, "A_log"),
        (dict(safe_gate=True), TypeError, "safe_gate"),
    ],
)
def test_refuses(function, change, error, named):
    with pytest.raises(error, match=f"^{named}:"):
        function(**inputs(), **change)


def test_refuses_what_only_one_has():
    given = inputs()
    with pytest.raises(ValueError, match="^cp_context:"):
        chunk_gated_delta_rule(**given, cp_context=object())
    with pytest.raises(ValueError, match="^chunk_size:"):
        chunk_gated_delta_rule(**given, chunk_size=48)
    for name in ("gk", "gv"):
        with pytest.raises(ValueError, match=f"^{name}:"):
            fused_recurrent_gated_delta_rule(**given, **{name: torch.zeros(2, 21, 4, 8)})
    with pytest.raises(ValueError, match="^g:"):
        fused_recurrent_gated_delta_rule(**(given | dict(g=None)), use_gate_in_kernel=True, A_log=torch.zeros(4))
