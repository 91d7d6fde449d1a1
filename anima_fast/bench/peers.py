"""The contenders: every backend of ours, and what people use today. A peer is a function

    peer(problem) -> Prepared(call, held)

that does once what its original does once (masks, compilation) and returns `call()`, which computes the problem and
returns a freshly allocated output, as ours does. `held` are the bytes it keeps between calls beyond q, k and v.
Each says whom it imitates and its formula, with b the plan's bias [S, Nq] spread over the keys [Nq, Nk].
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import math
import os
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from ..attention import OP, regional_attention
from .cases import MODES, Problem

__all__ = ["Contender", "Prepared", "aligned_bias", "backends", "contenders", "peers"]

_LOGIT = ("soft_log", "hard")

# What node packs and the literature write for "not this prompt" where a finite bias is wanted.
_HARD_VALUE = -80.0


class Prepared(NamedTuple):
    call: Callable[[], torch.Tensor]
    held: int = 0


@dataclasses.dataclass(frozen=True)
class Contender:
    """One way to compute a case.

    kind        "backend" or "peer"
    prepare     the function above
    modes       the modes it computes
    regional    False: it computes the first prompt without regions, whatever the mode (the line to beat)
    nrmse       instead of the error rule, for methods that quantise: largest root mean square error over that of
                the result
    needs       why it cannot run a case here, or None
    """

    name: str
    kind: str
    prepare: Callable[[Problem], Prepared]
    modes: tuple[str, ...] = MODES
    regional: bool = True
    nrmse: float | None = None
    needs: Callable[[Problem], str | None] = lambda problem: None

    @property
    def summary(self) -> str:
        """What it is, in a line."""
        return (
            f"anima_fast, backend {self.name}"
            if self.kind == "backend"
            else (self.prepare.__doc__ or "").split("\n")[0]
        )


def contenders() -> tuple[Contender, ...]:
    return (*backends(), *peers())


def backends() -> tuple[Contender, ...]:
    """Ours, in dispatch's order."""
    return tuple(
        Contender(b.name, "backend", functools.partial(_ours, b.name), needs=functools.partial(_why_not, b.name))
        for b in OP.backends
    )


def _ours(name: str, problem: Problem) -> Prepared:
    held = sum(x.numel() * x.element_size() for x in problem.plan.tensors[:4])

    def call() -> torch.Tensor:
        out = regional_attention(problem.q, problem.k, problem.v, problem.plan, backend=name)
        assert isinstance(out, torch.Tensor)
        return out

    return Prepared(call, held)


def _why_not(name: str, problem: Problem) -> str | None:
    backend = next(b for b in OP.backends if b.name == name)
    reason = backend.why_not(OP.facts(problem.q, problem.k, problem.v, problem.plan))
    if reason is None and name == "triton" and os.environ.get("TRITON_INTERPRET") == "1":
        return "TRITON_INTERPRET=1: the interpreter's time says nothing"
    return reason


# ---------------------------------------------------------------------------------------------------------------------


def stock(problem: Problem) -> Prepared:
    """Stock cross-attention of one prompt with its pads, no regions: the line to beat.

    ComfyUI's attention_pytorch and diffusers without regional prompting: softmax(scale q k_0ᵀ) v_0.
    """
    q, k, v = problem.q, problem.plain.k, problem.plain.v
    return Prepared(lambda: sdpa(q, k, v))


def sdpa_mask(problem: Problem) -> Prepared:
    """SDPA with a materialised additive mask over the padded keys; hard regions as -80.

    InvokeAI, Sen-sou's Anima nodes and most logit-bias packs: softmax(scale q kᵀ + b) v, the mask built once.
    """
    return _masked(problem, _HARD_VALUE)


def sdpa_mask_inf(problem: Problem) -> Prepared:
    """The same with -inf: torch's CPU kernel is several times slower on -80, whose exponentials are subnormal."""
    return _masked(problem, -math.inf)


def _masked(problem: Problem, excluded: float) -> Prepared:
    mask = _key_bias(problem, excluded).to(problem.q.dtype)
    return Prepared(lambda: sdpa(problem.q, problem.k, problem.v, attn_mask=mask), _bytes(mask))


def sdpa_folded(problem: Problem) -> Prepared:
    """SDPA with a materialised mask over folded keys: the pads of a prompt as one zero key with bias b + log P.

    What a caller of SDPA can do without a kernel. Folding is not timed: it can be done to the context, before the
    projections to k and v.
    """
    rows: list[int] = []
    sinks, counts = [], []
    for start, end, pads_end in problem.spans:
        width = end - start + (pads_end > end)  # the first pad is the zero key
        if pads_end > end:
            sinks.append((len(rows) + width - 1, math.log(pads_end - end)))
        rows += range(start, start + width)
        counts.append(width)
    index = torch.tensor(rows, device=problem.q.device)
    k, v = (x.transpose(1, 2)[:, index].transpose(1, 2) for x in (problem.k, problem.v))
    bias = problem.rows if problem.mode != "plain" else problem.rows[:, :1]
    bias = bias.clamp(min=_HARD_VALUE).T.repeat_interleave(torch.tensor(counts, device=bias.device), dim=1)
    for column, log_pads in sinks:
        bias[:, column] += log_pads
    mask = bias.to(problem.q.dtype)[None, None]
    return Prepared(lambda: sdpa(problem.q, k, v, attn_mask=mask), _bytes(mask))


def seed_pack(problem: Problem) -> Prepared:
    """The seed pack's way: an fp32 template, at each call cloned for each batch row and cast to the mask of SDPA.

    Freihaendig/anima-regional-comfy-nodes: softmax(scale q kᵀ + template) v, hard regions as -80. (It also strips the
    pads, which changes the result; here it keeps them, so that the results can be compared.)
    """
    q, k, v = problem.q, problem.k, problem.v
    template = _key_bias(problem, _HARD_VALUE)

    def call() -> torch.Tensor:
        mask = torch.cat([template.clone() for _ in range(q.shape[0])]).to(q.dtype)
        return sdpa(q, k, v, attn_mask=mask)

    return Prepared(call, _bytes(template))


def blend_packs(problem: Problem) -> Prepared:
    """Attention Couple's way: R + 1 full attentions on padded keys, and their weighted sum.

    ComfyUI-ppm, cgem156, prompt-control, forge-couple, krita's tooling nodes: Σ_s w_s softmax(scale q k_sᵀ) v_s. Summed
    in place, one attention after the other, which is kinder than repeating q R + 1 times along the batch.
    """
    parts = [(problem.k[:, :, start:end], problem.v[:, :, start:end]) for start, _, end in problem.spans]
    weights = problem.rows.to(problem.q.dtype)[:, :, None].contiguous()

    def call() -> torch.Tensor:
        out = sdpa(problem.q, *parts[0]).mul_(weights[0])
        for weight, part in zip(weights[1:], parts[1:], strict=True):
            out.addcmul_(sdpa(problem.q, *part), weight)
        return out

    return Prepared(call, _bytes(weights))


def flex(problem: Problem) -> Prepared:
    """FlexAttention, compiled, with a score_mod that looks the bias up by prompt and query.

    torch.nn.attention.flex_attention on padded keys: softmax(scale q kᵀ + b[prompt[j], i]) v. Bias and prompt numbers
    are captured tensors, so new masks do not recompile; each case compiles anew, for exactly its shapes, and pays the
    whole compilation in its cold call.
    """
    from torch._inductor.utils import clear_inductor_caches
    from torch.nn.attention.flex_attention import flex_attention

    bias = problem.rows.contiguous()
    prompt = torch.arange(len(bias), device=bias.device).repeat_interleave(_lengths(problem))

    def score_mod(
        score: torch.Tensor, b: torch.Tensor, h: torch.Tensor, i: torch.Tensor, j: torch.Tensor
    ) -> torch.Tensor:
        return score + bias[prompt[j], i]

    torch._dynamo.reset()
    clear_inductor_caches()  # else the code of another case would be found again, and its cold call warm
    compiled = torch.compile(flex_attention, dynamic=False)
    return Prepared(lambda: compiled(problem.q, problem.k, problem.v, score_mod=score_mod), _bytes(bias, prompt))


def xformers(problem: Problem) -> Prepared:
    """xformers' memory-efficient attention with an attention bias over the padded keys.

    ComfyUI's attention_xformers. Its bias is a tensor [B, H, Nq, Nk], broadcast over heads by stride.
    """
    from xformers.ops import memory_efficient_attention

    q, k, v = (x.transpose(1, 2) for x in (problem.q, problem.k, problem.v))
    bias = aligned_bias(_key_bias(problem, _HARD_VALUE).to(q.dtype))
    expanded = bias.expand(q.shape[0], q.shape[2], -1, -1)

    def call() -> torch.Tensor:
        out: torch.Tensor = memory_efficient_attention(q, k, v, attn_bias=expanded).transpose(1, 2)
        return out

    return Prepared(call, bias.untyped_storage().nbytes())


def kitchen_int8(problem: Problem) -> Prepared:
    """comfy-kitchen's INT8 attention with a materialised mask over the padded keys.

    ComfyUI's --use-ck-attention: Q and K quantised to 8 bits. Held to 3 % of the result, as its own tests do.
    """
    from comfy_kitchen import int8_attention

    mask = _key_bias(problem, _HARD_VALUE).to(problem.q.dtype)
    return Prepared(lambda: int8_attention(problem.q, problem.k, problem.v, attn_mask=mask), _bytes(mask))


def aligned_bias(bias: torch.Tensor) -> torch.Tensor:
    """A copy of a bias `[..., Nq, Nk]` whose rows are a multiple of 8 elements apart in memory: `stride(-2) % 8 == 0`,
    without which xformers' kernels refuse it."""
    keys = bias.shape[-1]
    memory = bias.new_zeros(*bias.shape[:-1], -(-keys // 8) * 8)
    memory[..., :keys] = bias
    return memory[..., :keys]


def peers() -> tuple[Contender, ...]:
    cuda_only = _gpu_package
    return (
        Contender("stock", "peer", stock, regional=False),
        Contender("sdpa_mask", "peer", sdpa_mask, _LOGIT),
        Contender("sdpa_mask_inf", "peer", sdpa_mask_inf, ("hard",)),
        Contender("sdpa_folded", "peer", sdpa_folded, (*_LOGIT, "plain")),
        Contender("seed_pack", "peer", seed_pack, _LOGIT),
        Contender("blend_packs", "peer", blend_packs, ("blend",)),
        Contender("flex", "peer", flex, (*_LOGIT, "plain"), needs=_flex_why_not),
        Contender("xformers", "peer", xformers, _LOGIT, needs=cuda_only("xformers")),
        Contender("kitchen_int8", "peer", kitchen_int8, _LOGIT, nrmse=0.03, needs=cuda_only("comfy_kitchen")),
    )


def _gpu_package(module: str) -> Callable[[Problem], str | None]:
    def why_not(problem: Problem) -> str | None:
        if importlib.util.find_spec(module) is None:
            return f"{module} is not installed"
        return None if problem.q.is_cuda else f"{module} needs a CUDA device; got {problem.q.device.type}"

    return why_not


def _flex_why_not(problem: Problem) -> str | None:
    if importlib.util.find_spec("torch.nn.attention.flex_attention") is None:
        return f"torch {torch.__version__} has no FlexAttention"
    if problem.q.device.type == "cpu":
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
        except InvalidCxxCompiler:
            return "torch.compile found no C++ compiler"
    return None


def _key_bias(problem: Problem, excluded: float) -> torch.Tensor:
    """The materialised bias, float32 `[1, 1, Nq, Nk]`, with exclusion as a number."""
    rows = problem.rows.clamp(min=excluded)
    return rows.T.repeat_interleave(_lengths(problem), dim=1)[None, None]


def _lengths(problem: Problem) -> torch.Tensor:
    """Rows of k that each prompt has, pads included."""
    return torch.tensor([end - start for start, _, end in problem.spans], device=problem.q.device)


def _bytes(*tensors: torch.Tensor) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)
