"""Mamba2's recurrence: ssd_chunk_scan over a sequence, ssd_state_update for one token.

    dt_t = clamp(softplus?(dt_t + dt_bias), dt_limit)
    S_t  = exp(dt_t A) S_{t-1} + dt_t x_t B_tᵀ            S [P, N], one a head, fp32
    y_t  = S_t C_t + D_t x_t,  then · silu(z_t) if z is given

The ops are `torch.ops.anima_fast.ssd_chunk_scan` and `.ssd_state_update`. Arguments and results are those of
mamba-ssm's mamba_chunk_scan_combined and selective_state_update; Dao and Gu, "Transformers are SSMs" (2024).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from . import dispatch
from .errors import invalid, wrong_type
from .scan_backends import facts_of, scan_backends
from .tensor_checks import (
    FLOATS,
    check_batch_of_sequences,
    check_chunk_size,
    check_cu_seqlens,
    check_divides,
    check_finite,
    check_first,
    check_flag,
    check_index,
    check_no_gradients,
    check_size,
    check_tensor,
    check_writable,
    float_like,
    precision_of,
    unit_last,
)

__all__ = ["ssd_chunk_scan", "ssd_state_update"]


def ssd_chunk_scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    chunk_size: int = 64,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    initial_states: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: Sequence[float] = (0.0, math.inf),
    return_final_states: bool = False,
    return_varlen_states: bool = False,
    state_dtype: torch.dtype | None = None,
    *,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """Mamba2's scan over L tokens.

    Args:
        x: `[B, L, H, P]`, fp32, fp16 or bf16 (fp64 in `reference`); P from 1 to 256, L and B may be 0.
        dt: `[B, L, H]`, any float type. Always clamped to `dt_limit`, after `dt_bias` and softplus: with the default
            limit a negative dt counts as 0, and a token with dt = 0 leaves the state alone (padding).
        A: `[H]`, finite (usually negative).
        B, C: `[B, L, G, N]`, as x; H a multiple of G, N from 1 to 256.
        chunk_size: tokens a chunk in backend `torch`; other backends choose. Results depend on it by rounding only.
        D: `[H]`, `[H, P]` or one a token, `[B, L, H]`; any float type.
        z: `[B, L, H, P]`, as x: the gate.
        dt_bias: `[H]`.
        initial_states: `[B, H, P, N]`, the state before token 0; belongs to sequence 0 of `seq_idx`.
        seq_idx: `[B, L]` int32 or int64: the state is 0 before every token whose number differs from the last one's
            (0 before token 0), so that sequences packed into a row do not see each other.
        cu_seqlens: `[sequences + 1]` int32 or int64, from 0 to L and never down; batch 1. Only says where
            `return_varlen_states` looks: without `seq_idx`, y runs on across sequences, as in mamba-ssm.
        dt_softplus: apply softplus to dt (x itself above 20).
        dt_limit: (lowest, highest) dt.
        return_final_states: also return the state after the last token.
        return_varlen_states: also return each sequence's last state, of that sequence alone.
        state_dtype: accepted for mamba-ssm's sake: None or a float type. States are kept in fp32, never less.
        backend: force one ("cpu", "cuda", "torch", "reference"); default: the first that fits.

    Returns:
        y `[B, L, H, P]` in x's type; or a tuple of y, the final states `[B, H, P, N]` fp32 if asked for, and the
        varlen states `[sequences, H, P, N]` fp32 if asked for (0 for an empty sequence).

    Raises:
        TypeError, ValueError: naming the argument, what came and what is allowed.
        NoBackendError: no backend, or not the forced one, can serve the call; with each one's reason.

    Example:
        >>> x, dt, A = torch.randn(1, 100, 8, 64), torch.rand(1, 100, 8), -torch.rand(8)
        >>> B, C = torch.randn(2, 1, 100, 1, 128)
        >>> y, state = ssd_chunk_scan(x, dt, A, B, C, return_final_states=True)
        >>> y.shape, state.shape
        (torch.Size([1, 100, 8, 64]), torch.Size([1, 8, 64, 128]))
    """
    low, high = _check_scan(
        x, dt, A, B, C, chunk_size, D, z, dt_bias, initial_states, seq_idx, cu_seqlens, dt_softplus, dt_limit,
        return_final_states, return_varlen_states, state_dtype,
    )  # fmt: skip
    if D is not None:
        D = D[..., None].expand(x.shape) if D.ndim != 2 else D.expand(x.shape)
    ends = cu_seqlens if return_varlen_states else None
    options = (chunk_size, dt_softplus, low, high, backend or "")
    # Without seq_idx the varlen states belong to another scan than y: one that restarts at each sequence.
    y, final, varlen = _ssd_chunk_scan(
        x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx, None if seq_idx is None else ends, return_final_states,
        *options,
    )  # fmt: skip
    if ends is not None and seq_idx is None:
        tokens = torch.arange(x.shape[1], dtype=ends.dtype, device=x.device)
        restarts = torch.searchsorted(ends, tokens, right=True)[None] - 1
        _, _, varlen = _ssd_chunk_scan(
            x, dt, A, B, C, None, None, dt_bias, initial_states, restarts, ends, False, *options
        )
    states = ([final] if return_final_states else []) + ([varlen] if return_varlen_states else [])
    return (y, *states) if states else y


def _check_scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    chunk_size: int,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    initial_states: torch.Tensor | None,
    seq_idx: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    dt_softplus: bool,
    dt_limit: Sequence[float],
    return_final_states: bool,
    return_varlen_states: bool,
    state_dtype: torch.dtype | None,
) -> tuple[float, float]:
    """Everything that can be told without the data. Returns dt_limit."""
    check_first("x", x, "[B, L, H, P]", 4)
    batch, length, heads, head_dim = x.shape
    check_size("x", "H", heads, high=2**31)
    check_size("x", "P", head_dim)
    check_tensor("dt", dt, "[B, L, H]", (batch, length, heads), x, own_type=True)
    check_tensor("A", A, "[H]", (heads,), x, own_type=True)
    groups, state_dim = _check_group("B", B, "[B, L, G, N]", (batch, length), heads)
    check_tensor("B", B, "[B, L, G, N]", (batch, length, groups, state_dim), x)
    check_tensor("C", C, "[B, L, G, N]", (batch, length, groups, state_dim), x)
    check_chunk_size(chunk_size)
    if D is not None:
        shapes = {1: ("[H]", (heads,)), 2: ("[H, P]", (heads, head_dim)), 3: ("[B, L, H]", (batch, length, heads))}
        if isinstance(D, torch.Tensor) and D.ndim not in shapes:
            raise invalid("D", f"shape {list(D.shape)}", "[H], [H, P] or [B, L, H]")
        axes, shape = shapes[D.ndim if isinstance(D, torch.Tensor) else 1]
        check_tensor("D", D, axes, shape, x, own_type=True)
    if z is not None:
        check_tensor("z", z, "[B, L, H, P]", (batch, length, heads, head_dim), x)
    if dt_bias is not None:
        check_tensor("dt_bias", dt_bias, "[H]", (heads,), x, own_type=True)
    if initial_states is not None:
        shape = (batch, heads, head_dim, state_dim)
        check_tensor("initial_states", initial_states, "[B, H, P, N]", shape, x, own_type=True)
    if seq_idx is not None:
        check_index("seq_idx", seq_idx, "[B, L]", (batch, length), x)
    if cu_seqlens is not None:
        check_batch_of_sequences(cu_seqlens, x)
    check_flag("dt_softplus", dt_softplus)
    check_flag("return_final_states", return_final_states)
    check_flag("return_varlen_states", return_varlen_states)
    if return_varlen_states and cu_seqlens is None:
        raise invalid("return_varlen_states", "True without cu_seqlens", "True with cu_seqlens, which say where")
    if state_dtype is not None and state_dtype not in FLOATS:
        raise invalid("state_dtype", f"{state_dtype}", "None or a float type")
    check_no_gradients(x, dt, A, B, C, D, z, dt_bias, initial_states)
    return _limits(dt_limit)


def _check_group(name: str, B: Any, axes: str, leading: tuple[int, ...], heads: int) -> tuple[int, int]:
    """G and N of B, whose first sizes are `leading`."""
    if not isinstance(B, torch.Tensor):
        raise wrong_type(name, B, f"a tensor {axes}")
    if B.ndim != len(leading) + 2 or B.shape[:-2] != leading:
        raise invalid(name, f"shape {list(B.shape)}", f"{axes} with the sizes of x, {list(leading)}, in front")
    groups, state_dim = B.shape[-2:]
    check_divides(name, "groups", groups, heads, "heads")
    check_size(name, "N", state_dim)
    return groups, state_dim


def _limits(dt_limit: Sequence[float]) -> tuple[float, float]:
    allowed = "(lowest, highest) with lowest <= highest"
    if not isinstance(dt_limit, (tuple, list)):
        raise wrong_type("dt_limit", dt_limit, allowed)
    if len(dt_limit) != 2:
        raise invalid("dt_limit", f"{dt_limit}", allowed)
    low, high = float(dt_limit[0]), float(dt_limit[1])
    if not low <= high:  # NaN too
        raise invalid("dt_limit", f"({low}, {high})", allowed)
    return low, high


torch.library.define(
    "anima_fast::ssd_chunk_scan",
    "(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, "
    "Tensor? initial_states, Tensor? seq_idx, Tensor? cu_seqlens, bool return_final_states, SymInt chunk_size, "
    "bool dt_softplus, float dt_min, float dt_max, str backend) "
    "-> (Tensor y, Tensor final_states, Tensor varlen_states)",
)


def _scan_outputs(
    x: torch.Tensor, B: torch.Tensor, cu_seqlens: torch.Tensor | None, final: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """y, final_states and varlen_states; of size 0 where not asked for."""
    state = (x.shape[2], x.shape[3], B.shape[3])
    precision = precision_of(x)
    return (
        x.new_empty(x.shape),
        x.new_empty((x.shape[0], *state) if final else (0,), dtype=precision),
        x.new_empty((0,) if cu_seqlens is None else (cu_seqlens.shape[0] - 1, *state), dtype=precision),
    )


@dispatch.torch_op("ssd_chunk_scan")
def _ssd_chunk_scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    initial_states: torch.Tensor | None,
    seq_idx: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    return_final_states: bool,
    chunk_size: int,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    check_no_gradients(x, dt, A, B, C, D, z, dt_bias, initial_states)
    check_finite("A", A)
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, x.shape[1])
        cu_seqlens = cu_seqlens.to(torch.int32).contiguous()
    chosen = SCAN.select(facts_of(x), backend or None)
    precision = precision_of(x)
    y, final, varlen = _scan_outputs(x, B, cu_seqlens, return_final_states)
    if x.shape[0]:
        chosen.implementation(
            unit_last(x),
            float_like(dt, x),
            A.to(precision),
            unit_last(B),
            unit_last(C),
            y,
            final if return_final_states else None,
            None if cu_seqlens is None else varlen,
            D=None if D is None else float_like(D, x),
            z=None if z is None else unit_last(z),
            dt_bias=None if dt_bias is None else dt_bias.to(precision),
            initial_state=None if initial_states is None else initial_states.to(precision).contiguous(),
            seq_idx=None if seq_idx is None else seq_idx.to(torch.int32).contiguous(),
            cu_seqlens=cu_seqlens,
            chunk_size=chunk_size,
            dt_softplus=dt_softplus,
            dt_min=dt_min,
            dt_max=dt_max,
        )
    return y, final, varlen


@torch.library.register_fake("anima_fast::ssd_chunk_scan")
def _(
    x: torch.Tensor, dt: Any, A: Any, B: torch.Tensor, C: Any, D: Any, z: Any, dt_bias: Any, initial_states: Any,
    seq_idx: Any, cu_seqlens: torch.Tensor | None, return_final_states: bool, *rest: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    return _scan_outputs(x, B, cu_seqlens, return_final_states)


def _scan_facts(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    chunk_size: int = 64,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    initial_states: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: Sequence[float] = (0.0, math.inf),
    return_final_states: bool = False,
    return_varlen_states: bool = False,
    state_dtype: torch.dtype | None = None,
) -> dispatch.Facts:
    """The facts of a public call (`explain`)."""
    _check_scan(
        x, dt, A, B, C, chunk_size, D, z, dt_bias, initial_states, seq_idx, cu_seqlens, dt_softplus, dt_limit,
        return_final_states, return_varlen_states, state_dtype,
    )  # fmt: skip
    return facts_of(x)


SCAN = dispatch.register(
    dispatch.Op(name="ssd_chunk_scan", facts=_scan_facts, backends=scan_backends("ssd_chunk_scan"))
)


def ssd_state_update(
    state: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: torch.Tensor | None = None,
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """One token of Mamba2's scan; `state` is updated in place. dt is not clamped.

    With x `[B, P]` there are no heads, and P has no limit: state `[B, P, N]`, dt and z `[B, P]`, A `[P, N]`, B and C
    `[B, N]`, D and dt_bias `[P]`.

    Args:
        state: `[B, H, P, N]`, or with `state_batch_indices` `[slots, H, P, N]`; any float type and strides.
        x: `[B, H, P]`, fp32, fp16 or bf16 (fp64 in `reference`).
        dt: `[B, H, P]`, any float type; expand one number a head to it, no copy is made.
        A: `[H, P, N]`; likewise. One number a head (strides 0) is checked to be finite, on the CPU.
        B, C: `[B, G, N]`, as x; H a multiple of G.
        D, dt_bias: `[H, P]`, any float type.
        z: `[B, H, P]`, as x: the gate.
        dt_softplus: apply softplus to dt (x itself above 20).
        state_batch_indices: `[B]` int32 or int64, the slot of each row. A row with a slot outside the state gives 0
            and changes nothing.
        backend: force one ("cpu", "cuda", "torch", "reference"); default: the first that fits.

    Returns:
        out, of x's shape and type.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is allowed.
        NoBackendError: no backend, or not the forced one, can serve the call; with each one's reason.

    Example:
        >>> state, x = torch.zeros(2, 8, 64, 128), torch.randn(2, 8, 64)
        >>> dt, A = torch.rand(2, 8, 1).expand(2, 8, 64), -torch.rand(8, 1, 1).expand(8, 64, 128)
        >>> B, C = torch.randn(2, 2, 1, 128)
        >>> ssd_state_update(state, x, dt, A, B, C).shape
        torch.Size([2, 8, 64])
    """
    _check_update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, state_batch_indices)
    if x.ndim == 3:
        return _ssd_state_update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, state_batch_indices, backend or "")
    # Without heads, each of the P channels is a head of one channel: the same formula, and P has no limit.
    return _ssd_state_update(
        state[:, :, None],
        x[..., None],
        dt[..., None],
        A[:, None],
        B[:, None],
        C[:, None],
        None if D is None else D[:, None],
        None if z is None else z[..., None],
        None if dt_bias is None else dt_bias[:, None],
        dt_softplus,
        state_batch_indices,
        backend or "",
    )[..., 0]


def _check_update(
    state: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    dt_softplus: bool,
    state_batch_indices: torch.Tensor | None,
) -> None:
    h = "H, " if isinstance(x, torch.Tensor) and x.ndim != 2 else ""
    check_first("x", x, "[B, H, P] or [B, P]", 3 if h else 2)
    b_shape: tuple[int, ...]
    batch = x.shape[0]
    heads = tuple(x.shape[1:])  # (H, P) or (P,)
    check_size("x", "H" if h else "P", heads[0], high=2**31)
    if h:
        check_size("x", "P", heads[1])
        groups, state_dim = _check_group("B", B, "[B, G, N]", (batch,), heads[0])
        b_axes, b_shape = "[B, G, N]", (batch, groups, state_dim)
    else:
        if not isinstance(B, torch.Tensor):
            raise wrong_type("B", B, "a tensor [B, N]")
        state_dim = B.shape[-1] if B.ndim else 0
        b_axes, b_shape = "[B, N]", (batch, state_dim)
    check_tensor("B", B, b_axes, b_shape, x)
    check_size("B", "N", state_dim)
    check_tensor("C", C, b_axes, b_shape, x)
    check_tensor("dt", dt, f"[B, {h}P]", (batch, *heads), x, own_type=True)
    check_tensor("A", A, f"[{h}P, N]", (*heads, state_dim), x, own_type=True)
    if isinstance(state, torch.Tensor) and state_batch_indices is not None and state.ndim:
        check_index("state_batch_indices", state_batch_indices, "[B]", (batch,), x)
        slots = (state.shape[0], *heads, state_dim)
        check_tensor("state", state, f"[slots, {h}P, N]", slots, x, own_type=True)
    else:
        check_tensor("state", state, f"[B, {h}P, N]", (batch, *heads, state_dim), x, own_type=True)
    check_writable("state", state)
    if D is not None:
        check_tensor("D", D, f"[{h}P]", heads, x, own_type=True)
    if z is not None:
        check_tensor("z", z, f"[B, {h}P]", (batch, *heads), x)
    if dt_bias is not None:
        check_tensor("dt_bias", dt_bias, f"[{h}P]", heads, x, own_type=True)
    check_flag("dt_softplus", dt_softplus)
    check_no_gradients(state, x, dt, A, B, C, D, z, dt_bias)


torch.library.define(
    "anima_fast::ssd_state_update",
    "(Tensor(a!) state, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, "
    "bool dt_softplus, Tensor? state_indices, str backend) -> Tensor",
)


@dispatch.torch_op("ssd_state_update")
def _ssd_state_update(
    state: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    dt_softplus: bool,
    state_indices: torch.Tensor | None,
    backend: str,
) -> torch.Tensor:
    check_no_gradients(state, x, dt, A, B, C, D, z, dt_bias)
    if A.stride(2) == 0 and A.stride(1) == 0:
        check_finite("A", A[:, 0, 0])
    chosen = UPDATE.select(facts_of(x), backend or None)
    out = x.new_empty(x.shape)
    if x.shape[0]:
        chosen.implementation(
            state,
            x,
            float_like(dt, x),
            A.to(precision_of(x)),
            B,
            C,
            out,
            D=None if D is None else float_like(D, x),
            z=z,
            dt_bias=None if dt_bias is None else float_like(dt_bias, x),
            dt_softplus=dt_softplus,
            state_indices=None if state_indices is None else state_indices.to(torch.int32).contiguous(),
        )
    return out


@torch.library.register_fake("anima_fast::ssd_state_update")
def _(state: Any, x: torch.Tensor, *rest: Any) -> torch.Tensor:
    return x.new_empty(x.shape)


def _update_facts(
    state: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: torch.Tensor | None = None,
) -> dispatch.Facts:
    """The facts of a public call (`explain`)."""
    _check_update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, state_batch_indices)
    return facts_of(x)


UPDATE = dispatch.register(
    dispatch.Op(name="ssd_state_update", facts=_update_facts, backends=scan_backends("ssd_state_update"))
)
