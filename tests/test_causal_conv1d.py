"""causal_conv1d: every backend against the fp64 oracle, invariants, the op's registration, refusals."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scan_cases import BACKENDS, DTYPES, Call, Maker, assert_close_to_oracle, in_fp64

import anima_fast
from anima_fast import causal_conv1d


def call(batch=2, channels=24, length=50, width=4, dtype=torch.float32, **changes):
    arguments = dict(
        x=torch.randn(batch, length, channels, dtype=dtype).transpose(1, 2), weight=torch.randn(channels, width)
    )
    for name, change in changes.items():
        arguments[name] = change(arguments[name]) if callable(change) else change
    return arguments


@st.composite
def calls(draw):
    make = Maker(draw)
    dtype, own = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(DTYPES))
    batch = draw(st.sampled_from([0, 1, 2, 3]))
    channels = draw(st.sampled_from([1, 3, 8, 24, 33, 64, 130]))
    length = draw(st.sampled_from([0, 1, 2, 3, 4, 7, 16, 33, 64]))
    width = draw(st.sampled_from([1, 2, 3, 4, 4, 7, 16]))
    arguments = dict(
        x=make.tensor(batch, channels, length, dtype=dtype),
        weight=make.tensor(channels, width, dtype=own),
        bias=make.maybe(channels, dtype=own, layouts=("plain",)),
        activation=draw(st.sampled_from([None, "silu", "swish"])),
    )
    if draw(st.booleans()):
        numbers = torch.randint(draw(st.sampled_from([0, -1])), 4, (batch, length), generator=make.generator)
        numbers = numbers.sort(1, descending=draw(st.booleans())).values  # padding on the right, or on the left
        arguments.update(seq_idx=numbers if draw(st.booleans()) else numbers.int())
    else:
        arguments.update(
            initial_states=make.maybe(batch, channels, width - 1, dtype=dtype),
            return_final_states=draw(st.booleans()),
        )
    return Call(arguments)


@pytest.mark.parametrize("backend", BACKENDS)
@given(arguments=calls())
def test_against_the_oracle(backend, arguments):
    assert_close_to_oracle(causal_conv1d, arguments, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_against_torch_conv1d(backend):
    arguments = call(bias=torch.randn(24))
    x, weight, bias = arguments.values()
    expected = torch.nn.functional.silu(torch.nn.functional.conv1d(x, weight[:, None], bias, padding=3, groups=24))
    out = causal_conv1d(**arguments, activation="silu", backend=backend)
    torch.testing.assert_close(out, expected[..., :50], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_output_has_the_memory_order_of_the_input(backend):
    rows = torch.randn(2, 50, 100)[..., 10:74].transpose(1, 2)  # a slice of a projection
    weight = torch.randn(64, 4)
    out = causal_conv1d(rows, weight, backend=backend)
    assert out.transpose(1, 2).is_contiguous()
    other = causal_conv1d(rows.contiguous(), weight, backend=backend)
    assert other.is_contiguous()
    torch.testing.assert_close(other, out, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@given(cut=st.integers(0, 50), width=st.sampled_from([1, 2, 4, 16]))
def test_a_split_anywhere_gives_the_whole(backend, cut, width):
    arguments = call(width=width, initial_states=torch.randn(2, 24, width - 1), activation="silu")
    whole, last = causal_conv1d(**arguments, return_final_states=True, backend=backend)
    outs, state = [], arguments["initial_states"]
    for span in (slice(0, cut), slice(cut, 50)):
        part = {**arguments, "x": arguments["x"][..., span], "initial_states": state}
        out, state = causal_conv1d(**part, return_final_states=True, backend=backend)
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, 2), whole, atol=1e-6, rtol=1e-6)
    assert torch.equal(state, last)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_packed_sequences_equal_separate_calls_whatever_a_neighbour_holds(backend, value):
    cuts = [0, 1, 3, 20, 50]
    seq_idx = torch.arange(4).repeat_interleave(torch.tensor(cuts).diff())[None]
    arguments = call(1, bias=torch.randn(24), activation="silu")
    arguments["x"][..., 3:20] = value
    packed = causal_conv1d(**arguments, seq_idx=seq_idx, backend=backend)
    for i in (0, 1, 3):
        one = {**arguments, "x": arguments["x"][..., cuts[i] : cuts[i + 1]]}
        alone = causal_conv1d(**one, backend=backend)
        torch.testing.assert_close(packed[..., cuts[i] : cuts[i + 1]], alone, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_tokens_count_by_their_number_wherever_they_lie(backend):
    """As in causal-conv1d: a sequence whose number comes back goes on."""
    x, weight = torch.randn(1, 24, 6), torch.randn(24, 4)
    out = causal_conv1d(x, weight, seq_idx=torch.tensor([[0, 1, 0, 0, 1, 1]]), backend=backend)
    torch.testing.assert_close(out[..., 2], weight[:, 3] * x[..., 2] + weight[:, 1] * x[..., 0])
    torch.testing.assert_close(out[..., 4], weight[:, 3] * x[..., 4] + weight[:, 0] * x[..., 1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_gives_zero_and_changes_nothing(backend):
    """Left and right padding with a negative seq_idx, whatever it holds."""
    arguments = call(1, bias=torch.randn(24), activation="silu")
    expected = causal_conv1d(**arguments, backend=backend)
    pads = torch.full((1, 24, 9), math.nan)
    seq_idx = torch.tensor([-1] * 9 + [0] * 50 + [-1] * 9)[None]
    padded = {**arguments, "x": torch.cat([pads, arguments["x"], pads], 2)}
    out = causal_conv1d(**padded, seq_idx=seq_idx, backend=backend)
    torch.testing.assert_close(out[..., 9:59], expected, atol=1e-6, rtol=1e-6)
    assert bool((out[..., :9] == 0).all()) and bool((out[..., 59:] == 0).all())


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_reaches_only_its_channel_and_the_tokens_after_it(backend):
    arguments = call()
    arguments["x"][0, 5, 20] = math.nan
    wrong = causal_conv1d(**arguments, backend=backend).isnan()
    assert bool(wrong[0, 5, 20:24].all()) and int(wrong.sum()) == 4


@pytest.mark.parametrize("backend", BACKENDS)
def test_final_states_go_where_they_are_asked_to(backend):
    cache = torch.zeros(3, 24, 5, dtype=torch.float16)
    arguments = call(dtype=torch.float16)
    target = cache[1:, :, 1:4]
    _, final = causal_conv1d(**arguments, return_final_states=True, final_states_out=target, backend=backend)
    assert final is target and torch.equal(target, arguments["x"][..., -3:])
    assert bool((cache[0] == 0).all()) and bool((cache[:, :, [0, 4]] == 0).all())


@pytest.mark.parametrize("backend", BACKENDS)
def test_bit_equal_on_repeat(backend):
    arguments = call(2, 300, 200)
    first = causal_conv1d(**arguments, backend=backend)
    assert all(torch.equal(causal_conv1d(**arguments, backend=backend), first) for _ in range(3))


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize(("batch", "length"), [(0, 10), (2, 0), (0, 0)])
def test_empty_batches_and_no_tokens(backend, batch, length):
    before = torch.randn(batch, 24, 3)
    arguments = call(batch, length=length, initial_states=before)
    out, final = causal_conv1d(**arguments, return_final_states=True, backend=backend)
    assert out.shape == (batch, 24, length) and torch.equal(final, before)


def test_fp64_goes_to_the_reference():
    arguments = in_fp64(call(length=5))
    assert "causal_conv1d: reference" in anima_fast.explain("causal_conv1d", **arguments)
    assert causal_conv1d(**arguments).dtype == torch.float64


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    x, weight = call().values()
    bias, states, seq_idx = torch.randn(24), torch.randn(2, 24, 3), torch.randint(0, 3, (2, 50))
    for arguments in (
        (x, weight, None, None, None, False, False, backend),
        (x.contiguous(), weight, bias, None, states, True, True, backend),
        (x, weight, bias, seq_idx, None, False, True, backend),
    ):
        torch.library.opcheck(torch.ops.anima_fast.causal_conv1d.default, arguments)


@pytest.mark.parametrize("backend", BACKENDS)
def test_torch_compile_with_dynamic_length(backend):
    def layer(x, weight, before):
        out, final = causal_conv1d(
            (x * 2).transpose(1, 2), weight, None, None, before, True, activation="silu", backend=backend
        )
        return out.transpose(1, 2) + 1, final

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (5, 9, 30):
        arguments = (torch.randn(2, length, 24), torch.randn(24, 4), torch.randn(2, 24, 3))
        torch.testing.assert_close(compiled(*arguments), layer(*arguments))


def test_gradients_are_refused():
    arguments = call(weight=lambda w: w.requires_grad_())
    with pytest.raises(ValueError, match="gradients: "):
        causal_conv1d(**arguments)
    with pytest.raises(ValueError, match="gradients: "):
        torch.ops.anima_fast.causal_conv1d(*arguments.values(), None, None, None, False, False, "torch")
    with torch.no_grad():
        causal_conv1d(**arguments)


# Of x, weight, bias and activation; causal_conv1d_update's too.
BAD = [
    (dict(x=0), TypeError, "x: got int; allowed: a tensor"),
    (dict(x=lambda x: x.int()), ValueError, "x: got torch.int32"),
    (dict(x=lambda x: x[None]), ValueError, r"x: got shape \[1, 2, .*\]; allowed: .*\[B, C, T\]"),
    (dict(weight=None), TypeError, "weight: got NoneType"),
    (dict(weight=torch.zeros(24, 1, 4)), ValueError, r"weight: got shape \[24, 1, 4\]; allowed: \[C, W\]"),
    (dict(weight=torch.zeros(23, 4)), ValueError, r"weight: got shape \[23, 4\]; allowed: \[C, W\] = \[24, 4\]"),
    (dict(weight=torch.zeros(24, 0)), ValueError, "weight: got W = 0; allowed: W from 1 to 16"),
    (dict(weight=torch.zeros(24, 17)), ValueError, "weight: got W = 17"),
    (dict(weight=torch.zeros(24, 4).int()), ValueError, "weight: got torch.int32; allowed: a float type"),
    (dict(weight=torch.zeros(24, 4).to("meta")), ValueError, "weight: got device meta"),
    (dict(bias=torch.zeros(23)), ValueError, r"bias: got shape \[23\]; allowed: \[C\] = \[24\]"),
    (dict(bias=0.5), TypeError, "bias: got float"),
    (dict(bias=torch.zeros(24).int()), ValueError, "bias: got torch.int32"),
    (dict(activation="gelu"), ValueError, "activation: got 'gelu'; allowed: None | 'silu' | 'swish'"),
    (dict(activation=True), ValueError, "activation: got True"),
    (dict(backend="triton"), ValueError, "backend: got 'triton'; allowed: cpu | cuda | torch | reference"),
]
STATES = torch.zeros(2, 24, 3)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        *BAD,
        (dict(x=lambda x: x[0]), ValueError, r"x: got shape \[24, 50\]; allowed: \[B, C, T\]"),
        (dict(seq_idx=torch.zeros(2, 49).int()), ValueError, r"seq_idx: got .*\[B, T\] = \[2, 50\]"),
        (dict(seq_idx=torch.zeros(2, 50)), ValueError, "seq_idx: got torch.float32; allowed: int32 or int64"),
        (
            dict(seq_idx=torch.zeros(2, 50).int(), initial_states=STATES),
            ValueError, "seq_idx: got a tensor together with initial_states",
        ),
        (
            dict(seq_idx=torch.zeros(2, 50).int(), return_final_states=True),
            ValueError, "seq_idx: got a tensor together with return_final_states",
        ),
        (dict(initial_states=STATES[..., 1:]), ValueError, r"initial_states: got .*\[B, C, W - 1\] = \[2, 24, 3\]"),
        (dict(initial_states=STATES.half()), ValueError, "initial_states: got torch.float16; allowed: torch.float32"),
        (dict(initial_states=[]), TypeError, "initial_states: got list"),
        (dict(return_final_states=None), TypeError, "return_final_states: got NoneType"),
        (dict(final_states_out=STATES), ValueError, "final_states_out: got a tensor with return_final_states=False"),
        (
            dict(final_states_out=STATES[:1], return_final_states=True),
            ValueError, r"final_states_out: got .*\[B, C, W - 1\] = \[2, 24, 3\]",
        ),
        (
            dict(final_states_out=STATES.half(), return_final_states=True),
            ValueError, "final_states_out: got torch.float16",
        ),
        (
            dict(final_states_out=STATES[:1].expand(2, 24, 3), return_final_states=True),
            ValueError, "final_states_out: got an expanded tensor",
        ),
    ],
)  # fmt: skip
def test_bad_calls_name_the_argument(changes, error, message):
    with pytest.raises(error, match=message):
        causal_conv1d(**call(**changes))
