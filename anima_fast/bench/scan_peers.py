"""The contenders of the recurrent ops: every backend of ours, and what people use today. A peer is a function

    peer(problem) -> Prepared(call, held)

that does once what its original does once and returns `call()`, which computes the problem and returns freshly
allocated results in the order of ours; what ours changes in place it changes too, in `problem.arguments`, which are
its own. Each says whom it imitates and its formula.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from .. import conv, gated_delta, ssd
from ..dispatch import Op
from .scan_cases import OPS, Problem

__all__ = ["Contender", "Prepared", "backends", "contenders", "peers"]

Results = tuple[torch.Tensor, ...]

# A Python loop takes 0.1 s to minutes a thousand tokens; the longest that is waited for.
_LONGEST_LOOP = 2048
# What a dense peer may hold in [L / Q, Q, Q, H] tensors; each that is measured holds about three at once.
_DENSE_BYTES = 12 * 2**30

_OURS: dict[str, Op] = {
    "ssd_chunk_scan": ssd.SCAN,
    "ssd_state_update": ssd.UPDATE,
    "gated_delta_rule": gated_delta.RULE,
    "gated_delta_step": gated_delta.STEP,
    "causal_conv1d": conv.CONV,
    "causal_conv1d_update": conv.UPDATE,
}


class Prepared(NamedTuple):
    call: Callable[[], Results]
    held: int = 0


@dataclasses.dataclass(frozen=True)
class Contender:
    """One way to compute some of the ops.

    kind        "backend" or "peer"
    ways        op -> the function above
    tolerance   added to the error rule, as a share of the largest value: what others promise is less than ours
    needs       why it cannot run a problem here, or None
    """

    name: str
    kind: str
    ways: Mapping[str, Callable[[Problem], Prepared]]
    tolerance: float = 0.0
    needs: Callable[[Problem], str | None] = lambda problem: None

    def summary(self, op: str) -> str:
        """What it is, in a line."""
        if self.kind == "backend":
            return f"anima_fast, backend {self.name}"
        return (inspect.getdoc(getattr(self.ways[op], "func", self.ways[op])) or "").split("\n")[0]


def contenders() -> tuple[Contender, ...]:
    return (*backends(), *peers())


def backends() -> tuple[Contender, ...]:
    """Ours, in dispatch's order; all ops have the same ones."""
    return tuple(
        Contender(
            b.name,
            "backend",
            dict.fromkeys(OPS, functools.partial(_ours, b.name)),
            needs=functools.partial(_why_not, b.name),
        )
        for b in _OURS["ssd_chunk_scan"].backends
    )


def _ours(name: str, problem: Problem) -> Prepared:
    return Prepared(lambda: problem.run(name))


def _why_not(name: str, problem: Problem) -> str | None:
    op = _OURS[problem.op]
    backend = next(b for b in op.backends if b.name == name)
    reason = backend.why_not({"device": problem.device.type, "dtype": problem.first.dtype})
    if reason is None and name == "reference":
        return _long_loop(problem)
    return reason


# --------------------------------------------------------------------------------------------------------- in torch


def ssd_dense(chunk: int, problem: Problem) -> Prepared:
    """Dense chunks as in the Mamba2 paper's minimal listing, written as batched matmuls.

    With E = exp(segment sums of dt A) of each chunk, [L / Q, H, Q, Q]: Y = ((C Bᵀ) ∘ E) (dt x) + exp(Σ dt A) C S_chunk,
    S_chunk from the chunks' own states by one more such matrix over chunks. (The last chunk is filled with dt = 0.)
    """
    a = problem.arguments

    def call() -> Results:
        length, heads = a["x"].shape[1:3]
        fill = -length % chunk
        dt = F.softplus(a["dt"].float() + a["dt_bias"])

        def chunks(x: torch.Tensor) -> torch.Tensor:  # [B, c, H, Q, ...]
            x = x.repeat_interleave(heads // x.shape[2], dim=2)
            x = F.pad(x, (0, 0, 0, 0, 0, fill))
            return x.unflatten(1, (-1, chunk)).transpose(2, 3)

        x, B, C = chunks(a["x"].float() * dt[..., None]), chunks(a["B"].float()), chunks(a["C"].float())
        decay = chunks((dt * a["A"])[..., None])[..., 0]
        total = decay.cumsum(-1)
        out = ((C @ B.mT) * _segment_sums(decay).exp()) @ x
        own = x.mT @ (B * (total[..., -1:] - total).exp()[..., None])  # [B, c, H, P, N]
        own = torch.cat([torch.zeros_like(own[:, :1]), own], dim=1)
        between = _segment_sums(F.pad(total[..., -1].transpose(1, 2), (1, 0))).exp()
        states = torch.einsum("bhij,bjhpn->bihpn", between, own)
        out = out + (C @ states[:, :-1].mT) * total.exp()[..., None]
        y = out.transpose(2, 3).flatten(1, 2)[:, :length] + a["D"][:, None] * a["x"]
        return _with_state(problem, y.to(a["x"].dtype), states[:, -1])

    return Prepared(call)


def _segment_sums(a: torch.Tensor) -> torch.Tensor:
    """[..., Q, Q] of a [..., Q]: the sum of a[j + 1 ... i] for i >= j, else -inf; each j summed anew, since differences
    of running sums would cancel."""
    size = a.shape[-1]
    below = torch.ones(size, size, dtype=torch.bool, device=a.device).tril()
    terms = a[..., :, None].expand(*a.shape, size).masked_fill(~below.tril(-1), 0)
    return terms.cumsum(-2).masked_fill(~below, float("-inf"))


def ssd_loop(problem: Problem) -> Prepared:
    """A Python loop over tokens, as nodes without a kernel run it.

    S = exp(dt A) S + dt x Bᵀ; y = S C + D x.
    """
    a = problem.arguments

    def call() -> Results:
        x, heads = a["x"].float(), a["x"].shape[2]
        B, C = (a[name].float().repeat_interleave(heads // a[name].shape[2], dim=2) for name in "BC")
        dt = F.softplus(a["dt"].float() + a["dt_bias"])
        decay, update = (dt * a["A"]).exp(), dt[..., None] * x
        state = x.new_zeros(x.shape[0], heads, x.shape[3], B.shape[3])
        outs = []
        for t in range(x.shape[1]):
            state = decay[:, t, :, None, None] * state + update[:, t, :, :, None] * B[:, t, :, None, :]
            outs.append((state @ C[:, t, :, :, None])[..., 0])
        y = torch.stack(outs, dim=1) + a["D"][:, None] * x
        return _with_state(problem, y.to(a["x"].dtype), state)

    return Prepared(call)


def _with_state(problem: Problem, y: torch.Tensor, state: torch.Tensor) -> Results:
    return (y, state) if problem.arguments["return_final_states"] else (y,)


def _long_loop(problem: Problem) -> str | None:
    if problem.length > _LONGEST_LOOP:
        return f"L {problem.length} > {_LONGEST_LOOP}: a Python loop over tokens"
    return None


def _too_dense(chunk: int, problem: Problem) -> str | None:
    size = 3 * 4 * -(-problem.length // chunk) * chunk * chunk * problem.shape.heads
    if size > _DENSE_BYTES:
        return f"its [L / {chunk}, {chunk}, {chunk}, H] tensors take {size / 2**30:.0f} GiB"
    return None


# ----------------------------------------------------------------------------------------------------- transformers


def _torch_function(family: str, name: str) -> Callable[..., Any]:
    """transformers' own function in torch, without what it may put in its place."""
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    function: Callable[..., Any] = inspect.unwrap(getattr(module, name))
    return function


def transformers_scan(chunk: int, problem: Problem) -> Prepared:
    """transformers' mamba2_chunk_scan in torch: dense chunks, [L / Q, Q, Q, H]."""
    function = _torch_function("mamba2", "mamba2_chunk_scan")
    arguments = {**problem.arguments}
    inputs = [arguments.pop(name) for name in ("x", "dt", "A", "B", "C")]

    def call() -> Results:
        out = function(*inputs, chunk, **arguments)
        y, *state = out if isinstance(out, tuple) else (out,)
        return (y.to(inputs[0].dtype), *state)

    return Prepared(call)


def transformers_state_update(problem: Problem) -> Prepared:
    """transformers' mamba2_selective_state_update in torch."""
    function = _torch_function("mamba2", "mamba2_selective_state_update")
    arguments = {**problem.arguments}
    inputs = [arguments.pop(name) for name in ("state", "x", "dt", "A", "B", "C")]
    return Prepared(lambda: (function(*inputs, **arguments),))


def transformers_chunk_delta(problem: Problem) -> Prepared:
    """transformers' torch_chunk_gated_delta_rule."""
    return _transformers_delta("torch_chunk_gated_delta_rule", problem)


def transformers_recurrent_delta(problem: Problem) -> Prepared:
    """transformers' torch_recurrent_gated_delta_rule: a Python loop over tokens."""
    return _transformers_delta("torch_recurrent_gated_delta_rule", problem)


def _transformers_delta(name: str, problem: Problem) -> Prepared:
    function = _torch_function("qwen3_5", name)
    arguments = {**problem.arguments}
    inputs = [arguments.pop(name) for name in ("q", "k", "v")]

    def call() -> Results:
        o, state = function(*inputs, **arguments)
        return (o,) if state is None else (o, state)

    return Prepared(call)


def transformers_conv(problem: Problem) -> Prepared:
    """transformers' causal_conv1d_fn in torch: a padded conv1d."""
    function = _torch_function("mamba2", "causal_conv1d_fn")
    a = problem.arguments
    return Prepared(lambda: (function(a["x"], a["weight"], a["bias"], a["activation"]),))


def transformers_conv_update(problem: Problem) -> Prepared:
    """transformers' causal_conv1d_update in torch."""
    function = _torch_function("mamba2", "causal_conv1d_update")
    a = problem.arguments
    return Prepared(lambda: (function(a["x"], a["conv_state"], a["weight"], a["bias"], a["activation"]),))


# ----------------------------------------------------------------------------------------------------- GPU packages


def mamba_ssm_scan(problem: Problem) -> Prepared:
    """mamba-ssm's mamba_chunk_scan_combined (Triton), chunk_size 256."""
    module = importlib.import_module("mamba_ssm.ops.triton.ssd_combined")
    arguments = {**problem.arguments}
    inputs = [arguments.pop(name) for name in ("x", "dt", "A", "B", "C")]
    return Prepared(lambda: _as_tuple(module.mamba_chunk_scan_combined(*inputs, 256, **arguments)))


def mamba_ssm_state_update(problem: Problem) -> Prepared:
    """mamba-ssm's selective_state_update (Triton)."""
    module = importlib.import_module("mamba_ssm.ops.triton.selective_state_update")
    return Prepared(lambda: (module.selective_state_update(**problem.arguments),))


def fla_chunk(problem: Problem) -> Prepared:
    """fla's chunk_gated_delta_rule (Triton)."""
    module = importlib.import_module("fla.ops.gated_delta_rule")
    return Prepared(lambda: _as_tuple(module.chunk_gated_delta_rule(**problem.arguments)))


def fla_recurrent(problem: Problem) -> Prepared:
    """fla's fused_recurrent_gated_delta_rule (Triton)."""
    module = importlib.import_module("fla.ops.gated_delta_rule")
    return Prepared(lambda: _as_tuple(module.fused_recurrent_gated_delta_rule(**problem.arguments)))


def causal_conv1d_fn(problem: Problem) -> Prepared:
    """causal-conv1d's causal_conv1d_fn (CUDA)."""
    module = importlib.import_module("causal_conv1d")
    return Prepared(lambda: (module.causal_conv1d_fn(**problem.arguments),))


def causal_conv1d_update(problem: Problem) -> Prepared:
    """causal-conv1d's causal_conv1d_update (CUDA)."""
    module = importlib.import_module("causal_conv1d")
    return Prepared(lambda: (module.causal_conv1d_update(**problem.arguments),))


def _as_tuple(out: Any) -> Results:
    return tuple(x for x in out if x is not None) if isinstance(out, (tuple, list)) else (out,)


# ---------------------------------------------------------------------------------------------------------------------


def peers() -> tuple[Contender, ...]:
    return (
        *(
            Contender(
                f"transformers_{chunk}",
                "peer",
                {"ssd_chunk_scan": functools.partial(transformers_scan, chunk)},
                1e-4,
                needs=functools.partial(_needs_transformers, chunk),
            )
            for chunk in (256, 128, 64)
        ),
        Contender(
            "transformers",
            "peer",
            {
                "gated_delta_rule": transformers_chunk_delta,
                "causal_conv1d": transformers_conv,
                "ssd_state_update": transformers_state_update,
                "gated_delta_step": transformers_recurrent_delta,
                "causal_conv1d_update": transformers_conv_update,
            },
            1e-4,
            needs=functools.partial(_needs_transformers, 64),
        ),
        Contender(
            "transformers_loop",
            "peer",
            {"gated_delta_rule": transformers_recurrent_delta},
            1e-4,
            needs=lambda problem: _needs_transformers(1, problem) or _long_loop(problem),
        ),
        Contender(
            "dense_64",
            "peer",
            {"ssd_chunk_scan": functools.partial(ssd_dense, 64)},
            1e-4,
            needs=functools.partial(_too_dense, 64),
        ),
        Contender("loop", "peer", {"ssd_chunk_scan": ssd_loop}, 1e-4, needs=_long_loop),
        # In TF32, as they are used.
        Contender(
            "mamba_ssm",
            "peer",
            {"ssd_chunk_scan": mamba_ssm_scan, "ssd_state_update": mamba_ssm_state_update},
            1e-2,
            needs=functools.partial(_needs_gpu_package, "mamba_ssm"),
        ),
        Contender(
            "fla",
            "peer",
            {"gated_delta_rule": fla_chunk, "gated_delta_step": fla_recurrent},
            1e-2,
            needs=functools.partial(_needs_gpu_package, "fla"),
        ),
        Contender(
            "causal_conv1d",
            "peer",
            {"causal_conv1d": causal_conv1d_fn, "causal_conv1d_update": causal_conv1d_update},
            1e-4,
            needs=functools.partial(_needs_gpu_package, "causal_conv1d"),
        ),
    )


def _needs_transformers(chunk: int, problem: Problem) -> str | None:
    if importlib.util.find_spec("transformers") is None:
        return "transformers is not installed"
    family, name = (
        ("qwen3_5", "torch_chunk_gated_delta_rule") if "delta" in problem.op else ("mamba2", "causal_conv1d_fn")
    )
    if importlib.util.find_spec(f"transformers.models.{family}") is None:
        return f"this transformers has no {family}"
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    if not hasattr(module, name):
        return f"this transformers has no {name} of its own"
    return _too_dense(chunk, problem) if problem.op in ("ssd_chunk_scan", "gated_delta_rule") else None


def _needs_gpu_package(module: str, problem: Problem) -> str | None:
    if importlib.util.find_spec(module) is None:
        return f"{module} is not installed"
    return None if problem.device.type == "cuda" else f"{module} needs a CUDA device; got {problem.device.type}"
