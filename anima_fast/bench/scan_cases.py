"""The recurrences that are measured: shapes of models, inputs strided as their layers hand them over, operations.

x, B and C (q, k and v) are views of one [B, L, channels] tensor, the output of the convolution; the convolution's own
input is such a tensor transposed. `L` counts tokens; the step ops take one.

`operations` are those that the chunked algorithm needs, in chunks of q = 64 tokens (the last one shorter), with
causal products on their triangle:

    ssd_chunk_scan     Σ_chunks q H (4 N P + q P) + q G q N          C·S, state update; M x; C·B
    gated_delta_rule   Σ_chunks q Hv (6 K V + 2 q V) + q Hk 2 q K    k·S, q·S, state update; M d, solve; k·k, q·k

less the products with S of a sequence's first chunk, where S = 0, and less its last chunk's state update where no
final state is asked for. Decays, l2 norms and D are not counted.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

import anima_fast

from ..errors import invalid
from .cases import DTYPES

__all__ = ["OPS", "SHAPES", "Case", "Problem", "Shape", "operations", "parse_shape"]

CHUNK = 64
WIDTH = 4  # of the convolution


class Shape(NamedTuple):
    """Sizes of a layer: P, N and G of Mamba2; V, K and Hk of the gated delta rule."""

    family: str  # "ssd" | "delta"
    heads: int
    head_dim: int
    state_dim: int
    groups: int

    def __str__(self) -> str:
        names = ("H", "P", "N", "G") if self.family == "ssd" else ("Hv", "V", "K", "Hk")
        return " ".join(f"{name} {size}" for name, size in zip(names, self[1:], strict=True))

    @property
    def channels(self) -> tuple[int, int, int]:
        """Channels of the convolution that belong to x, B and C; to q, k and v."""
        x, b = self.heads * self.head_dim, self.groups * self.state_dim
        return (x, b, b) if self.family == "ssd" else (b, b, x)


# Those of the models' published configurations, or transformers' defaults for them.
SHAPES = {
    "mamba2-2.7b": Shape("ssd", 80, 64, 128, 1),
    "mamba2-codestral": Shape("ssd", 128, 64, 128, 8),
    "encoder-mamba2": Shape("ssd", 32, 128, 64, 32),  # Anima's text encoder, read as Mamba2
    "nemotron-3-nano": Shape("ssd", 64, 64, 128, 8),
    "granite-4-h-micro": Shape("ssd", 64, 64, 128, 1),
    "granite-4-h-tiny": Shape("ssd", 48, 64, 128, 1),
    "zamba2-2.7b": Shape("ssd", 80, 64, 64, 1),
    "bamba": Shape("ssd", 128, 64, 256, 1),
    "falcon-h1": Shape("ssd", 128, 8, 256, 1),
    "qwen3.5-4b": Shape("delta", 32, 128, 128, 16),  # Anima's text encoder
}

#: op -> (families, whether it takes a sequence)
OPS: dict[str, tuple[tuple[str, ...], bool]] = {
    "ssd_chunk_scan": (("ssd",), True),
    "gated_delta_rule": (("delta",), True),
    "causal_conv1d": (("ssd", "delta"), True),
    "ssd_state_update": (("ssd",), False),
    "gated_delta_step": (("delta",), False),
    "causal_conv1d_update": (("ssd", "delta"), False),
}

# Where the heads (or channels), and the groups that heads share, are in arguments and results: what the oracle slices.
_HEADS: dict[str, dict[str, int]] = {
    "ssd_chunk_scan": {"x": 2, "dt": 2, "A": 0, "D": 0, "dt_bias": 0},
    "gated_delta_rule": {"v": 2, "g": 2, "beta": 2},
    "causal_conv1d": {"x": 1, "weight": 0, "bias": 0},
}
_GROUPS: dict[str, dict[str, int]] = {"ssd_chunk_scan": {"B": 2, "C": 2}, "gated_delta_rule": {"q": 2, "k": 2}}
_RESULTS: dict[str, tuple[int, ...]] = {"ssd_chunk_scan": (2, 1), "gated_delta_rule": (2, 1), "causal_conv1d": (1,)}


def parse_shape(text: str) -> Shape:
    """A shape by its name, or from "ssd:H,P,N,G" or "delta:Hv,V,K,Hk".

    Example:
        >>> parse_shape("ssd:8,64,128,1")
        Shape(family='ssd', heads=8, head_dim=64, state_dim=128, groups=1)
    """
    if text in SHAPES:
        return SHAPES[text]
    family, _, rest = text.partition(":")
    sizes = [int(n) if n.isascii() and n.isdigit() else 0 for n in rest.split(",")]
    if family not in ("ssd", "delta") or len(sizes) != 4 or min(sizes) < 1 or sizes[0] % sizes[3]:
        allowed = f"all | {' | '.join(SHAPES)} | ssd:H,P,N,G | delta:Hv,V,K,Hk, where G divides H and Hk Hv"
        raise invalid("--shapes", repr(text), allowed)
    return Shape(family, *sizes)


def operations(shape: Shape, length: int, *, final_state: bool) -> int:
    """Multiplications and additions of a scan that starts from nothing, by the formula above."""
    _, heads, head_dim, state_dim, groups = shape
    product = 2 * heads * head_dim * state_dim  # of a token with S, or of an update of S
    total = 0
    for start in range(0, length, CHUNK):
        q = min(CHUNK, length - start)
        reads, causal, shared = (1, 1, 1) if shape.family == "ssd" else (2, 2, 2)
        total += q * heads * causal * q * head_dim + q * groups * shared * q * state_dim
        total += q * product * ((reads if start else 0) + (1 if final_state or start + q < length else 0))
    return total


@dataclasses.dataclass(frozen=True)
class Case:
    """One op at one shape and length."""

    op: str
    shape: Shape
    length: int = 1
    dtype: str = "fp32"
    device: str = "cpu"
    final_state: bool = True
    name: str = ""

    def __post_init__(self) -> None:
        for name, value, allowed in (("op", self.op, tuple(OPS)), ("dtype", self.dtype, tuple(DTYPES))):
            if value not in allowed:
                raise invalid(name, repr(value), " | ".join(allowed))
        families, sequence = OPS[self.op]
        if self.shape.family not in families:
            raise invalid("shape", f"{self.shape.family} {self.shape}", f"a shape of {' or '.join(families)}")
        if self.length < 1 or not (sequence or self.length == 1):
            raise invalid("length", self.length, "a whole number >= 1" if sequence else "1: a step takes one token")

    def __str__(self) -> str:
        name = f" ({self.name})" if self.name else ""
        what = f"C {sum(self.shape.channels)}" if "conv" in self.op else str(self.shape)
        length = f"L {self.length}, " if OPS[self.op][1] else ""
        return f"{self.op}, {what}{name}, {length}{self.dtype}, {self.device}"

    def build(self) -> Problem:
        """The tensors of this case; the same ones each time."""
        make = _Maker(DTYPES[self.dtype], self.device)
        arguments: dict[str, Any] = {}
        count = None
        if "conv" in self.op:
            arguments = self._conv(make)
        elif self.shape.family == "ssd":
            arguments = self._ssd(make)
        else:
            arguments = self._delta(make)
        if self.op in ("ssd_chunk_scan", "gated_delta_rule"):
            count = operations(self.shape, self.length, final_state=self.final_state)
        return Problem(str(self), self.op, self.shape, arguments, count)

    def _mixed(self, make: _Maker, heads: tuple[int, int, int]) -> list[torch.Tensor]:
        """The convolution's output as its three parts, [B, L, heads, ...]."""
        parts = make(1, self.length, sum(self.shape.channels)).split(self.shape.channels, dim=-1)
        return [x.view(1, self.length, n, -1) for x, n in zip(parts, heads, strict=True)]

    def _conv(self, make: _Maker) -> dict[str, Any]:
        channels = sum(self.shape.channels)
        arguments: dict[str, Any] = dict(
            x=make(1, self.length, channels).transpose(1, 2), weight=make(channels, WIDTH), activation="silu"
        )
        arguments["bias"] = make(channels) if self.shape.family == "ssd" else None  # delta-rule models have none
        if self.op == "causal_conv1d_update":
            arguments["conv_state"] = make(1, channels, WIDTH)
        return arguments

    def _ssd(self, make: _Maker) -> dict[str, Any]:
        _, heads, head_dim, state_dim, groups = self.shape
        x, B, C = self._mixed(make, (heads, groups, groups))
        first = make.spread(-3, -1, heads)  # Mamba2 begins with dt from 0.001 to 0.1
        arguments: dict[str, Any] = dict(x=x, dt=make(1, self.length, heads), B=B, C=C, dt_softplus=True)
        arguments.update(A=-1 - 15 * make.uniform(heads), D=make.uniform(heads), dt_bias=first.expm1().log())
        if self.op == "ssd_chunk_scan":
            return {**arguments, "return_final_states": self.final_state}
        arguments.update({name: arguments[name][:, 0] for name in ("x", "B", "C")})
        per_head = {name: arguments[name][..., None].expand(-1, head_dim) for name in ("D", "dt_bias")}
        A = arguments["A"][:, None, None].expand(-1, head_dim, state_dim)
        dt = arguments["dt"][:, 0, :, None].expand(-1, -1, head_dim)
        return {**arguments, **per_head, "A": A, "dt": dt, "state": make.fp32(1, heads, head_dim, state_dim)}

    def _delta(self, make: _Maker) -> dict[str, Any]:
        _, heads, head_dim, state_dim, groups = self.shape
        q, k, v = self._mixed(make, (groups, groups, heads))
        decay = make.spread(-3, 0.5, heads)
        arguments: dict[str, Any] = dict(q=q, k=k, v=v, use_qk_l2norm_in_kernel=True)
        arguments.update(
            g=-decay * F.softplus(make.fp32(1, self.length, heads) + 1), beta=make(1, self.length, heads).sigmoid()
        )
        if self.op == "gated_delta_rule":
            return {**arguments, "output_final_state": self.final_state}
        state = make.fp32(1, heads, state_dim, head_dim)
        return {**arguments, "initial_state": state, "output_final_state": True}


class _Maker:
    """Random tensors on a device, the same ones for the same calls."""

    def __init__(self, dtype: torch.dtype, device: str) -> None:
        self.dtype, self.device = dtype, device
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator).to(self.device, self.dtype)

    def fp32(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator).to(self.device)

    def spread(self, low: float, high: float, heads: int) -> torch.Tensor:
        """Powers of ten, one a head: the first head remembers for thousands of tokens, the last for a few. Were all
        decays strong, a contender that loses its state between chunks would pass the check."""
        return (10 ** torch.linspace(low, high, heads)).to(self.device)

    def uniform(self, *shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=self.generator).to(self.device)


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """Arguments of the public op, and how many operations it needs (None: bound by memory, not counted)."""

    title: str
    op: str
    shape: Shape
    arguments: dict[str, Any]
    operations: int | None

    @property
    def first(self) -> torch.Tensor:
        x: torch.Tensor = self.arguments["q" if "q" in self.arguments else "x"]
        return x

    @property
    def device(self) -> torch.device:
        return self.first.device

    @property
    def length(self) -> int:
        return self.first.shape[-1 if self.op == "causal_conv1d" else 1] if OPS[self.op][1] else 1

    @property
    def changed(self) -> str | None:
        """The argument that the op changes in place."""
        return {"ssd_state_update": "state", "causal_conv1d_update": "conv_state"}.get(self.op)

    def with_own_state(self) -> Problem:
        """The same with a copy of what is changed in place."""
        if self.changed is None:
            return self
        own = {self.changed: self.arguments[self.changed].clone()}
        return dataclasses.replace(self, arguments={**self.arguments, **own})

    def run(self, backend: str | None = None, dtype: torch.dtype | None = None) -> tuple[torch.Tensor, ...]:
        """What the public op gives, on a backend, after a conversion of all floats to `dtype`."""
        arguments = {
            name: x.to(dtype) if dtype is not None and isinstance(x, torch.Tensor) else x
            for name, x in self.arguments.items()
        }
        out = getattr(anima_fast, self.op)(**arguments, backend=backend)
        return tuple(x for x in out if x is not None) if isinstance(out, tuple) else (out,)

    def part(self) -> tuple[Problem, torch.Tensor | None]:
        """The problem of three heads (channels) only, and which; steps are left whole."""
        if self.op not in _HEADS:
            return self, None
        name, dim = next((n, d) for n, d in _HEADS[self.op].items() if n in ("x", "v"))
        count = self.arguments[name].shape[dim]
        chosen = torch.tensor(sorted({0, count // 2, count - 1}), device=self.device)
        arguments = dict(self.arguments)
        groups = chosen // max(1, count // self.shape.groups)
        for names, index in ((_HEADS[self.op], chosen), (_GROUPS.get(self.op, {}), groups)):
            for name, dim in names.items():
                if arguments[name] is not None:
                    arguments[name] = arguments[name].index_select(dim, index)
        return dataclasses.replace(self, arguments=arguments), chosen

    def select(self, results: tuple[torch.Tensor, ...], chosen: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        """The results of the heads that `part` has chosen."""
        if chosen is None:
            return results
        return tuple(x.index_select(dim, chosen) for x, dim in zip(results, _RESULTS[self.op], strict=False))
