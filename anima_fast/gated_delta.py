"""The gated delta rule: gated_delta_rule in chunks, gated_delta_step token by token.

    q_t, k_t <- q_t / sqrt(|q_t|² + 1e-6), same for k, if asked;  q_t <- scale q_t
    S = exp(g_t) S;  d = beta_t (v_t - Sᵀ k_t);  S = S + k_t dᵀ;  o_t = Sᵀ q_t        S [K, V], one a value head, fp32

The ops are `torch.ops.anima_fast.gated_delta_rule` and `.gated_delta_step`. Arguments and results are those of fla's
chunk_gated_delta_rule and fused_recurrent_gated_delta_rule; Yang, Kautz and Hatamizadeh, "Gated Delta Networks" (2024).
"""

from __future__ import annotations

import math
from typing import Any

import torch

from . import dispatch
from .errors import invalid, wrong_type
from .scan_backends import facts_of, scan_backends
from .tensor_checks import (
    check_batch_of_sequences,
    check_chunk_size,
    check_cu_seqlens,
    check_divides,
    check_first,
    check_flag,
    check_no_gradients,
    check_size,
    check_tensor,
    float_like,
    precision_of,
    unit_last,
)

__all__ = ["gated_delta_rule", "gated_delta_step"]


def gated_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    chunk_size: int = 64,
    *,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The gated delta rule over L tokens.

    Args:
        q, k: `[B, L, Hk, K]`, fp32, fp16 or bf16 (fp64 in `reference`), of one type; K from 1 to 256, L and B may be 0.
        v: `[B, L, Hv, V]`, as q; Hv a multiple of Hk (value head h reads key head h // (Hv / Hk)), V from 1 to 256.
        g: `[B, L, Hv]`, the log of the decay, any float type.
        beta: `[B, L, Hv]`, any float type. A token with beta = 0 and g = 0 leaves the state alone (padding).
        scale: factor of q; default K ** -0.5.
        initial_state: `[B, Hv, K, V]`, or with `cu_seqlens` `[sequences, Hv, K, V]`.
        output_final_state: also return each sequence's last state.
        use_qk_l2norm_in_kernel: divide q and k by sqrt(|.|² + 1e-6) first.
        cu_seqlens: `[sequences + 1]` int32 or int64, from 0 to L and never down; batch 1: sequence i is the tokens
            from `cu_seqlens[i]` to `cu_seqlens[i + 1]`, and they do not see each other.
        chunk_size: tokens a chunk in backend `torch`; other backends choose. Results depend on it by rounding only.
        backend: force one ("cpu", "cuda", "torch", "reference"); default: the first that fits.

    Returns:
        o `[B, L, Hv, V]` in q's type, and the final states, fp32 in the shape of `initial_state`, or None.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is allowed.
        NoBackendError: no backend, or not the forced one, can serve the call; with each one's reason.

    Example:
        >>> q, k, v = torch.randn(1, 77, 16, 128), torch.randn(1, 77, 16, 128), torch.randn(1, 77, 32, 128)
        >>> g, beta = -torch.rand(1, 77, 32), torch.rand(1, 77, 32)
        >>> o, state = gated_delta_rule(q, k, v, g, beta, output_final_state=True, use_qk_l2norm_in_kernel=True)
        >>> o.shape, state.shape
        (torch.Size([1, 77, 32, 128]), torch.Size([1, 32, 128, 128]))
    """
    _check(q, k, v, g, beta, initial_state, output_final_state, use_qk_l2norm_in_kernel, cu_seqlens)
    check_chunk_size(chunk_size)
    o, state = _gated_delta_rule(
        q, k, v, g, beta, _scale(scale, q), initial_state, output_final_state, use_qk_l2norm_in_kernel, cu_seqlens,
        chunk_size, backend or "",
    )  # fmt: skip
    return o, state if output_final_state else None


def gated_delta_step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    *,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`gated_delta_rule` token by token: the faster way for a few tokens, such as one in decoding; any L.

    Arguments, results and errors are those of `gated_delta_rule`, without `chunk_size`.

    Example:
        >>> q, k, v = torch.randn(1, 1, 16, 128), torch.randn(1, 1, 16, 128), torch.randn(1, 1, 32, 128)
        >>> g, beta, state = -torch.rand(1, 1, 32), torch.rand(1, 1, 32), torch.zeros(1, 32, 128, 128)
        >>> o, state = gated_delta_step(q, k, v, g, beta, initial_state=state, output_final_state=True)
        >>> o.shape
        torch.Size([1, 1, 32, 128])
    """
    _check(q, k, v, g, beta, initial_state, output_final_state, use_qk_l2norm_in_kernel, cu_seqlens)
    o, state = _gated_delta_step(
        q, k, v, g, beta, _scale(scale, q), initial_state, output_final_state, use_qk_l2norm_in_kernel, cu_seqlens,
        backend or "",
    )  # fmt: skip
    return o, state if output_final_state else None


def _scale(scale: float | None, q: torch.Tensor) -> float:
    if scale is None:
        return float(q.shape[-1] ** -0.5)
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise wrong_type("scale", scale, "None or a finite number")
    if not math.isfinite(scale):
        raise invalid("scale", f"{scale}", "None or a finite number")
    return float(scale)


def _check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    initial_state: torch.Tensor | None,
    output_final_state: bool,
    use_qk_l2norm_in_kernel: bool,
    cu_seqlens: torch.Tensor | None,
) -> None:
    """Everything that can be told without the data."""
    check_first("q", q, "[B, L, Hk, K]", 4)
    batch, length, key_heads, key_dim = q.shape
    check_size("q", "K", key_dim)
    check_tensor("k", k, "[B, L, Hk, K]", (batch, length, key_heads, key_dim), q)
    if not isinstance(v, torch.Tensor):
        raise wrong_type("v", v, "a tensor [B, L, Hv, V]")
    if v.ndim != 4:
        raise invalid("v", f"shape {list(v.shape)}", "[B, L, Hv, V]")
    heads, value_dim = v.shape[2:]
    check_tensor("v", v, "[B, L, Hv, V]", (batch, length, heads, value_dim), q)
    check_size("v", "V", value_dim)
    check_size("v", "Hv", heads, high=2**31)
    check_divides("q", "heads", key_heads, heads, "heads of v")
    check_tensor("g", g, "[B, L, Hv]", (batch, length, heads), q, own_type=True)
    check_tensor("beta", beta, "[B, L, Hv]", (batch, length, heads), q, own_type=True)
    sequences = batch
    if cu_seqlens is not None:
        check_batch_of_sequences(cu_seqlens, q)
        sequences = cu_seqlens.shape[0] - 1
    if initial_state is not None:
        axes = "[B, Hv, K, V]" if cu_seqlens is None else "[sequences, Hv, K, V]"
        shape = (sequences, heads, key_dim, value_dim)
        check_tensor("initial_state", initial_state, axes, shape, q, own_type=True)
    check_flag("output_final_state", output_final_state)
    check_flag("use_qk_l2norm_in_kernel", use_qk_l2norm_in_kernel)
    check_no_gradients(q, k, v, g, beta, initial_state)


_ARGUMENTS = (
    "(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, float scale, Tensor? initial_state, "
    "bool output_final_state, bool l2norm, Tensor? cu_seqlens, {}str backend) -> (Tensor o, Tensor final_state)"
)
torch.library.define("anima_fast::gated_delta_rule", _ARGUMENTS.format("SymInt chunk_size, "))
torch.library.define("anima_fast::gated_delta_step", _ARGUMENTS.format(""))


def _outputs(
    q: torch.Tensor, v: torch.Tensor, final: bool, cu_seqlens: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """o and final_state, of size 0 where not asked for."""
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    shape = (sequences, v.shape[2], q.shape[3], v.shape[3]) if final else (0,)
    return v.new_empty(v.shape), v.new_empty(shape, dtype=precision_of(q))


def _run(
    op: dispatch.Op,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    scale: float,
    initial_state: torch.Tensor | None,
    output_final_state: bool,
    l2norm: bool,
    cu_seqlens: torch.Tensor | None,
    *,
    backend: str,
    **options: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    check_no_gradients(q, k, v, g, beta, initial_state)
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, q.shape[1])
        cu_seqlens = cu_seqlens.to(torch.int32).contiguous()
    chosen = op.select(facts_of(q), backend or None)
    o, final = _outputs(q, v, output_final_state, cu_seqlens)
    if q.shape[0]:
        chosen.implementation(
            unit_last(q),
            unit_last(k),
            unit_last(v),
            float_like(g, q),
            float_like(beta, q),
            o,
            final if output_final_state else None,
            initial_state=None if initial_state is None else initial_state.to(precision_of(q)).contiguous(),
            scale=scale,
            l2norm=l2norm,
            cu_seqlens=cu_seqlens,
            **options,
        )
    return o, final


@dispatch.torch_op("gated_delta_rule")
def _gated_delta_rule(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    *others, chunk_size, backend = arguments
    return _run(RULE, *others, backend=backend, chunk_size=chunk_size)


@dispatch.torch_op("gated_delta_step")
def _gated_delta_step(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    *others, backend = arguments
    return _run(STEP, *others, backend=backend)


def _fake(
    q: torch.Tensor, k: Any, v: torch.Tensor, g: Any, beta: Any, scale: float, initial_state: Any, final: bool,
    l2norm: bool, cu_seqlens: torch.Tensor | None, *rest: Any,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    return _outputs(q, v, final, cu_seqlens)


torch.library.register_fake("anima_fast::gated_delta_rule", _fake)
torch.library.register_fake("anima_fast::gated_delta_step", _fake)


def _facts(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    chunk_size: int = 64,
) -> dispatch.Facts:
    """The facts of a public call (`explain`)."""
    _check(q, k, v, g, beta, initial_state, output_final_state, use_qk_l2norm_in_kernel, cu_seqlens)
    return facts_of(q)


RULE = dispatch.register(dispatch.Op(name="gated_delta_rule", facts=_facts, backends=scan_backends("gated_delta_rule")))
STEP = dispatch.register(dispatch.Op(name="gated_delta_step", facts=_facts, backends=scan_backends("gated_delta_step")))
