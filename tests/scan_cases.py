"""What the tests of the recurrent ops share: backends, layouts of random tensors, random calls, the oracle."""

from __future__ import annotations

import pytest
import torch
from error_rule import assert_error_rule
from hypothesis import strategies as st

import anima_fast

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LAYOUTS = ("plain", "heads first", "sliced", "last dimension apart", "one row for all")

_NO_CPU = anima_fast.backends()["ssd_chunk_scan"]["cpu"]
BACKENDS = ["torch", pytest.param("cpu", marks=pytest.mark.skipif(_NO_CPU is not None, reason=str(_NO_CPU)))]


def laid_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """x [B, ...] with the same values (one row's, for the last layout) and other strides."""
    if layout == "heads first" and x.ndim > 2:
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "sliced":
        wide = torch.full((*x.shape[:-1], x.shape[-1] + 3), torch.nan, dtype=x.dtype)
        wide[..., 2:-1] = x
        return wide[..., 2:-1]
    if layout == "last dimension apart":
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "one row for all":
        return x[:1].expand(x.shape) if x.shape[0] else x
    return x


def decays(shape, generator) -> torch.Tensor:
    """Log decays from -1e-6 to -100, all magnitudes alike."""
    return -(10 ** (torch.rand(shape, generator=generator) * 8 - 6))


def in_fp64(x):
    """A tensor, or the tensors of a dict, in fp64; whatever else as it is."""
    if isinstance(x, dict):
        return {name: in_fp64(value) for name, value in x.items()}
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def copied(arguments: dict) -> dict:
    """The arguments of a call that changes some of them, each with its strides."""

    def copy(x):
        if not isinstance(x, torch.Tensor):
            return x
        return x.new_empty(0).set_(x.untyped_storage().clone(), x.storage_offset(), x.shape, x.stride())

    return {name: copy(x) for name, x in arguments.items()}


def results(value) -> list[torch.Tensor]:
    """The tensors that an op gave, as a list."""
    return [x for x in value if x is not None] if isinstance(value, tuple) else [value]


def assert_close_to_oracle(op, arguments: dict, backend: str, *, changed: tuple[str, ...] = ()) -> list[torch.Tensor]:
    """op(**arguments) on `backend` by the error rule, with 5e-6 relative on top in fp32; `changed` arguments are
    results too. Gives the results."""
    runs = []
    for given, name in (
        (in_fp64(arguments), "reference"),
        (copied(arguments), "reference"),
        (copied(arguments), backend),
    ):
        given = copied(given)
        out = results(op(**given, backend=name))
        runs.append(out + [given[c] for c in changed])
    for number, (oracle, plain, out) in enumerate(zip(*runs, strict=True)):
        assert out.dtype == plain.dtype
        extra = 5e-6 / torch.finfo(torch.float32).eps if out.dtype == torch.float32 else 0.0
        largest = float(oracle.nan_to_num().abs().max()) if oracle.numel() else 0.0
        what = f"result {number} of {op.__name__} on {backend!r}, {described(arguments)}"
        assert_error_rule(out, oracle, plain, score=extra, value=largest, what=what)
    return runs[2]


class Call(dict):
    """Arguments of a call. Its repr, which a failing test prints, has shapes instead of numbers."""

    def __repr__(self):
        return described(self)


def described(arguments: dict) -> str:
    return ", ".join(
        f"{name} {list(x.shape)} {str(x.dtype).removeprefix('torch.')} strides {x.stride()}"
        if isinstance(x, torch.Tensor)
        else f"{name}={x}"
        for name, x in arguments.items()
    )


class Maker:
    """Draws the tensors of one call."""

    def __init__(self, draw):
        self.draw = draw
        self.generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))

    def tensor(self, *shape, dtype=torch.float32, values="normal", layouts=LAYOUTS):
        if values == "normal":
            x = torch.randn(shape, generator=self.generator)
        elif values == "positive":
            x = torch.rand(shape, generator=self.generator)
        else:
            x = decays(shape, self.generator)
        return laid_out(x.to(dtype), self.draw(st.sampled_from(layouts)))

    def maybe(self, *shape, **options):
        return self.tensor(*shape, **options) if self.draw(st.booleans()) else None

    def cut_points(self, length, most=5):
        """0 = c_0 <= c_1 <= ... = length."""
        inner = self.draw(st.lists(st.integers(0, length), max_size=most))
        return torch.tensor([0, *sorted(inner), length], dtype=self.draw(st.sampled_from([torch.int32, torch.int64])))


@st.composite
def scan_calls(draw, dtypes=DTYPES, lengths=(0, 1, 2, 5, 15, 16, 17, 63, 64, 65, 100, 130)):
    """Arguments of ssd_chunk_scan."""
    make = Maker(draw)
    dtype, own = draw(st.sampled_from(dtypes)), draw(st.sampled_from(DTYPES))
    varlen = draw(st.booleans())
    batch = 1 if varlen else draw(st.sampled_from([0, 1, 1, 2, 3]))
    length = draw(st.sampled_from(lengths))
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    heads = groups * draw(st.sampled_from([1, 2, 3]))
    head_dim = draw(st.sampled_from([1, 3, 8, 16, 17, 32, 64]))
    state_dim = draw(st.sampled_from([1, 5, 8, 16, 31, 64]))
    arguments = dict(
        x=make.tensor(batch, length, heads, head_dim, dtype=dtype),
        A=-make.tensor(heads, values="positive", layouts=("plain",)) * draw(st.sampled_from([0.0, 1.0, 16.0])),
        B=make.tensor(batch, length, groups, state_dim, dtype=dtype),
        C=make.tensor(batch, length, groups, state_dim, dtype=dtype),
        z=make.maybe(batch, length, heads, head_dim, dtype=dtype),
        initial_states=make.maybe(batch, heads, head_dim, state_dim, dtype=draw(st.sampled_from(DTYPES))),
        chunk_size=draw(st.sampled_from([64, 64, 1, 7, 16, 128, 1000])),
        return_final_states=draw(st.booleans()),
    )
    if draw(st.booleans()):
        arguments.update(dt=make.tensor(batch, length, heads, dtype=own), dt_softplus=True)
    else:
        arguments.update(dt=-make.tensor(batch, length, heads, dtype=own, values="decay"))
    if draw(st.booleans()):
        arguments.update(dt_bias=make.tensor(heads, dtype=own, layouts=("plain",)))
    if draw(st.booleans()):
        # A negative dt lets the state grow by e^(-dt A) a token: little, or it leaves the range of fp32.
        arguments.update(dt_limit=draw(st.sampled_from([(0.01, 0.5), (-0.001, 3.0), (0.25, 0.25), (0.0, 20.0)])))
    D = draw(st.sampled_from([None, (heads,), (heads, head_dim), (batch, length, heads)]))
    if D is not None:
        arguments.update(D=make.tensor(*D, dtype=own, layouts=("plain",)))
    if varlen:
        arguments.update(cu_seqlens=make.cut_points(length), return_varlen_states=True)
    if draw(st.booleans()):
        if varlen and draw(st.booleans()):
            arguments.update(seq_idx=sequence_numbers(arguments["cu_seqlens"]))
        else:
            numbers = torch.randint(0, 4, (batch, length), generator=make.generator)
            ordered = draw(st.booleans())
            arguments.update(seq_idx=(numbers.sort(1).values if ordered else numbers).int())
    return Call(arguments)


def sequence_numbers(cu_seqlens: torch.Tensor) -> torch.Tensor:
    """seq_idx [1, L] of packed sequences."""
    lengths = cu_seqlens.diff()
    return torch.arange(len(lengths)).repeat_interleave(lengths)[None]


@st.composite
def delta_calls(draw, dtypes=DTYPES, lengths=(0, 1, 2, 5, 15, 16, 17, 63, 64, 65, 100, 130)):
    """Arguments of gated_delta_rule, without chunk_size."""
    make = Maker(draw)
    dtype = draw(st.sampled_from(dtypes))
    varlen = draw(st.booleans())
    batch = 1 if varlen else draw(st.sampled_from([0, 1, 1, 2, 3]))
    length = draw(st.sampled_from(lengths))
    key_heads = draw(st.sampled_from([1, 2, 3]))
    heads = key_heads * draw(st.sampled_from([1, 2, 3]))
    key_dim = draw(st.sampled_from([1, 3, 8, 16, 17, 32, 64]))
    value_dim = draw(st.sampled_from([1, 5, 8, 16, 31, 64]))
    q, k = (make.tensor(batch, length, key_heads, key_dim, dtype=dtype) for _ in "qk")
    l2norm = draw(st.booleans())
    if not l2norm:  # longer keys make the rule itself unstable
        k = torch.nn.functional.normalize(k.float(), dim=-1).to(dtype) * 0.99
    own = [draw(st.sampled_from(DTYPES)) for _ in range(3)]
    arguments = dict(
        q=q,
        k=k,
        v=make.tensor(batch, length, heads, value_dim, dtype=dtype),
        g=make.tensor(batch, length, heads, dtype=own[0], values="decay"),
        beta=make.tensor(batch, length, heads, dtype=own[1], values="positive"),
        use_qk_l2norm_in_kernel=l2norm,
        output_final_state=draw(st.booleans()),
        scale=draw(st.sampled_from([None, 1.0, 0.3])),
    )
    sequences = batch
    if varlen:
        arguments.update(cu_seqlens=make.cut_points(length))
        sequences = len(arguments["cu_seqlens"]) - 1
    return Call(arguments, initial_state=make.maybe(sequences, heads, key_dim, value_dim, dtype=own[2]))
