"""The short causal convolution in front of a recurrence: causal_conv1d, and causal_conv1d_update for decoding.

    out[b, c, t] = act(bias[c] + Σ_j weight[c, j] x[b, c, t - (W - 1) + j])

The ops are `torch.ops.anima_fast.causal_conv1d` and `.causal_conv1d_update`. Arguments and results are those of the
causal-conv1d package's causal_conv1d_fn and causal_conv1d_update.
"""

from __future__ import annotations

from typing import Any

import torch

from . import dispatch
from .errors import invalid, wrong_type
from .scan_backends import facts_of, scan_backends
from .tensor_checks import (
    check_first,
    check_flag,
    check_index,
    check_no_gradients,
    check_size,
    check_tensor,
    check_writable,
    float_like,
)

__all__ = ["causal_conv1d", "causal_conv1d_update"]

_WIDEST = 16


def causal_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
    initial_states: torch.Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: torch.Tensor | None = None,
    activation: str | None = None,
    *,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Depthwise causal convolution of T tokens.

    Args:
        x: `[B, C, T]`, fp32, fp16 or bf16 (fp64 in `reference`), any strides; usually a transposed `[B, T, C]`.
        weight: `[C, W]`, any float type; `weight[:, W - 1]` is on the token itself. W from 1 to 16.
        bias: `[C]`, any float type.
        seq_idx: `[B, T]` int32 or int64: tokens of another number count as 0; tokens with a negative number (padding)
            give 0. Not together with initial or final states, as in causal-conv1d.
        initial_states: `[B, C, W - 1]`, as x: the tokens before token 0; default 0.
        return_final_states: also return the last W - 1 tokens, `initial_states` included.
        final_states_out: `[B, C, W - 1]`, as x: where to write them; it is then what is returned.
        activation: None, "silu" or "swish" (the same).
        backend: force one ("cpu", "cuda", "torch", "reference"); default: the first that fits.

    Returns:
        out in x's shape, type and dimension order; with `return_final_states` (out, final states).

    Raises:
        TypeError, ValueError: naming the argument, what came and what is allowed.
        NoBackendError: no backend, or not the forced one, can serve the call; with each one's reason.

    Example:
        >>> x = torch.randn(1, 100, 256).transpose(1, 2)
        >>> out, state = causal_conv1d(x, torch.randn(256, 4), return_final_states=True, activation="silu")
        >>> out.shape, state.shape
        (torch.Size([1, 256, 100]), torch.Size([1, 256, 3]))
    """
    silu = _check_conv(x, weight, bias, seq_idx, initial_states, return_final_states, final_states_out, activation)
    out, final = _causal_conv1d(x, weight, bias, seq_idx, initial_states, return_final_states, silu, backend or "")
    if not return_final_states:
        return out
    return out, final if final_states_out is None else final_states_out.copy_(final)


def _check_conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    seq_idx: torch.Tensor | None,
    initial_states: torch.Tensor | None,
    return_final_states: bool,
    final_states_out: torch.Tensor | None,
    activation: str | None,
) -> bool:
    """Everything that can be told without the data. Returns whether the activation is SiLU."""
    check_first("x", x, "[B, C, T]", 3)
    batch, channels, length = x.shape
    before = (batch, channels, _check_weight(weight, bias, x) - 1)
    check_flag("return_final_states", return_final_states)
    if seq_idx is not None:
        check_index("seq_idx", seq_idx, "[B, T]", (batch, length), x)
        if initial_states is not None or return_final_states:
            what = "initial_states" if initial_states is not None else "return_final_states"
            raise invalid("seq_idx", f"a tensor together with {what}", "seq_idx alone, or states alone")
    if initial_states is not None:
        check_tensor("initial_states", initial_states, "[B, C, W - 1]", before, x)
    if final_states_out is not None:
        if not return_final_states:
            raise invalid("final_states_out", "a tensor with return_final_states=False", "return_final_states=True")
        check_tensor("final_states_out", final_states_out, "[B, C, W - 1]", before, x)
        check_writable("final_states_out", final_states_out)
    check_no_gradients(x, weight, bias, initial_states, final_states_out)
    return _silu(activation)


def _check_weight(weight: torch.Tensor, bias: torch.Tensor | None, x: torch.Tensor) -> int:
    """weight and bias against x; returns W."""
    if not isinstance(weight, torch.Tensor):
        raise wrong_type("weight", weight, "a tensor [C, W]")
    if weight.ndim != 2:
        raise invalid("weight", f"shape {list(weight.shape)}", "[C, W]")
    width = weight.shape[1]
    check_tensor("weight", weight, "[C, W]", (x.shape[1], width), x, own_type=True)
    check_size("weight", "W", width, high=_WIDEST)
    if bias is not None:
        check_tensor("bias", bias, "[C]", (x.shape[1],), x, own_type=True)
    return width


def _silu(activation: str | None) -> bool:
    if activation not in (None, "silu", "swish"):
        raise invalid("activation", repr(activation), "None | 'silu' | 'swish'")
    return activation is not None


torch.library.define(
    "anima_fast::causal_conv1d",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? seq_idx, Tensor? initial_states, bool return_final_states, "
    "bool silu, str backend) -> (Tensor out, Tensor final_states)",
)


def _like(x: torch.Tensor) -> torch.Tensor:
    """An output for x [B, C, T] in its dimension order: transposed where x has its channels together."""
    batch, channels, length = x.shape
    if x.stride(1) == 1 and x.stride(2) != 1:
        return x.new_empty(batch, length, channels).transpose(1, 2)
    return x.new_empty(batch, channels, length)


def _conv_outputs(x: torch.Tensor, weight: torch.Tensor, final: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """out and final_states, of size 0 where not asked for."""
    shape = (x.shape[0], x.shape[1], weight.shape[1] - 1) if final else (0,)
    return _like(x), x.new_empty(shape)


@dispatch.torch_op("causal_conv1d")
def _causal_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    seq_idx: torch.Tensor | None,
    initial_states: torch.Tensor | None,
    return_final_states: bool,
    silu: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    check_no_gradients(x, weight, bias, initial_states)
    chosen = CONV.select(facts_of(x), backend or None)
    out, final = _conv_outputs(x, weight, return_final_states)
    if x.shape[0] and x.shape[1]:
        chosen.implementation(
            x,
            float_like(weight, x),
            None if bias is None else float_like(bias, x),
            out,
            final if return_final_states else None,
            initial_states=initial_states,
            seq_idx=None if seq_idx is None else seq_idx.to(torch.int32).contiguous(),
            silu=silu,
        )
    return out, final


@torch.library.register_fake("anima_fast::causal_conv1d")
def _(
    x: torch.Tensor, weight: torch.Tensor, bias: Any, seq_idx: Any, initial_states: Any, return_final_states: bool,
    *rest: Any,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    return _conv_outputs(x, weight, return_final_states)


def _conv_facts(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
    initial_states: torch.Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: torch.Tensor | None = None,
    activation: str | None = None,
) -> dispatch.Facts:
    """The facts of a public call (`explain`)."""
    _check_conv(x, weight, bias, seq_idx, initial_states, return_final_states, final_states_out, activation)
    return facts_of(x)


CONV = dispatch.register(dispatch.Op(name="causal_conv1d", facts=_conv_facts, backends=scan_backends("causal_conv1d")))


def causal_conv1d_update(
    x: torch.Tensor,
    conv_state: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: torch.Tensor | None = None,
    conv_state_indices: torch.Tensor | None = None,
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """Decoding: appends the tokens of x to `conv_state`, in place, and convolves.

    Args:
        x: `[B, C]` or `[B, C, T]`, fp32, fp16 or bf16 (fp64 in `reference`).
        conv_state: `[B, C, S]`, or with `conv_state_indices` `[slots, C, S]`, as x, any strides; S at least W - 1
            (and at least 1). It holds the last S tokens, oldest first.
        weight: `[C, W]`, any float type. W from 1 to 16.
        bias: `[C]`, any float type.
        activation: None, "silu" or "swish" (the same).
        cache_seqlens: `[B]` int32 or int64: `conv_state` is a ring, and token t of row b goes to position
            (cache_seqlens[b] + t) mod S.
        conv_state_indices: `[B]` int32 or int64, the slot of each row. A row with a slot outside the state gives 0 and
            changes nothing.
        backend: force one ("cpu", "cuda", "torch", "reference"); default: the first that fits.

    Returns:
        out, of x's shape and type.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is allowed.
        NoBackendError: no backend, or not the forced one, can serve the call; with each one's reason.

    Example:
        >>> state = torch.zeros(2, 256, 4)
        >>> causal_conv1d_update(torch.randn(2, 256), state, torch.randn(256, 4), activation="silu").shape
        torch.Size([2, 256])
    """
    silu = _check_update(x, conv_state, weight, bias, activation, cache_seqlens, conv_state_indices)
    if x.ndim == 3:
        return _causal_conv1d_update(
            x, conv_state, weight, bias, silu, cache_seqlens, conv_state_indices, backend or ""
        )
    return _causal_conv1d_update(
        x[..., None], conv_state, weight, bias, silu, cache_seqlens, conv_state_indices, backend or ""
    )[..., 0]


def _check_update(
    x: torch.Tensor,
    conv_state: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str | None,
    cache_seqlens: torch.Tensor | None,
    conv_state_indices: torch.Tensor | None,
) -> bool:
    """Everything that can be told without the data. Returns whether the activation is SiLU."""
    check_first("x", x, "[B, C] or [B, C, T]", 2 if isinstance(x, torch.Tensor) and x.ndim == 2 else 3)
    batch, channels = x.shape[:2]
    width = _check_weight(weight, bias, x)
    if not isinstance(conv_state, torch.Tensor):
        raise wrong_type("conv_state", conv_state, "a tensor [B, C, S]")
    if conv_state.ndim != 3:
        raise invalid("conv_state", f"shape {list(conv_state.shape)}", "[B, C, S]")
    slots, _, size = conv_state.shape
    if conv_state_indices is None:
        slots, axes = batch, "[B, C, S]"
    else:
        axes = "[slots, C, S]"
        check_index("conv_state_indices", conv_state_indices, "[B]", (batch,), x)
    check_tensor("conv_state", conv_state, axes, (slots, channels, size), x)
    if size < max(width - 1, 1):
        raise invalid("conv_state", f"S = {size} for W = {width}", f"S >= {max(width - 1, 1)}, the tokens before x")
    check_writable("conv_state", conv_state)
    if cache_seqlens is not None:
        check_index("cache_seqlens", cache_seqlens, "[B]", (batch,), x)
    check_no_gradients(x, conv_state, weight, bias)
    return _silu(activation)


torch.library.define(
    "anima_fast::causal_conv1d_update",
    "(Tensor x, Tensor(a!) conv_state, Tensor weight, Tensor? bias, bool silu, Tensor? cache_seqlens, "
    "Tensor? state_indices, str backend) -> Tensor",
)


@dispatch.torch_op("causal_conv1d_update")
def _causal_conv1d_update(
    x: torch.Tensor,
    conv_state: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    silu: bool,
    cache_seqlens: torch.Tensor | None,
    state_indices: torch.Tensor | None,
    backend: str,
) -> torch.Tensor:
    check_no_gradients(x, conv_state, weight, bias)
    chosen = UPDATE.select(facts_of(x), backend or None)
    out = _like(x)
    if out.numel():
        chosen.implementation(
            x,
            conv_state,
            float_like(weight, x),
            None if bias is None else float_like(bias, x),
            out,
            silu=silu,
            cache_seqlens=None if cache_seqlens is None else cache_seqlens.to(torch.int32).contiguous(),
            state_indices=None if state_indices is None else state_indices.to(torch.int32).contiguous(),
        )
    return out


@torch.library.register_fake("anima_fast::causal_conv1d_update")
def _(x: torch.Tensor, *rest: Any) -> torch.Tensor:
    return _like(x)


def _update_facts(
    x: torch.Tensor,
    conv_state: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: torch.Tensor | None = None,
    conv_state_indices: torch.Tensor | None = None,
) -> dispatch.Facts:
    """The facts of a public call (`explain`)."""
    _check_update(x, conv_state, weight, bias, activation, cache_seqlens, conv_state_indices)
    return facts_of(x)


UPDATE = dispatch.register(
    dispatch.Op(name="causal_conv1d_update", facts=_update_facts, backends=scan_backends("causal_conv1d_update"))
)
