"""Regional attention in one pass over K and V: softmax over prompt segments, the bias formed in registers.

A context of Nk keys holds S segments: contiguous ranges [start, end) of rows of K, each with a count of pads, zero
rows that were never stored. Query i has one number for segment s: a bias b_s(i) (logit) or a weight w_s(i) (blend).
With x_ij = scale q_i.k_j, and n_s pads:

    logit   out(i) = sum_s sum_j exp(x_ij + b_s(i)) v_j / Z(i)        lse(i) = log Z(i)
            Z(i)   = sum_s [ sum_j exp(x_ij + b_s(i)) + n_s exp(b_s(i)) ]
    blend   out(i) = sum_s w_s(i) [ sum_j exp(x_ij) v_j / (sum_j exp(x_ij) + n_s) ]

Shapes: q, out [B, H, Nq, D], k, v [B, Hk, Nk, D], lse [B, H, Nq], bias [P, S, Nq], segments [P, S, 3], order [P, Nq].

Tiling. A program owns BLOCK_M queries of one head and walks the segments, then the key tiles of a segment, with an
online softmax (Milakov & Gimelshein 2018; FlashAttention-2, Dao 2023) in base 2 and fp32. Inside a segment the bias
is constant along the keys, so the row maximum is taken over raw products and the bias enters per row only,
p = exp2(fma(qk, scale, b - m)): the inner loop is that of plain attention, and a bias costs nothing per element.
A pad has score b. In logit mode a second online softmax, over pads alone, gathers them in two numbers a row and is
merged at the end, so that no segment rescales the output tile for them; in blend mode they are where a segment starts.

Skipping. When a hard plan is bound, its queries are sorted by allowed set and `order` is the permutation. A tile then
meets few kinds of query, and a segment that all its rows exclude (bias -inf, weight 0) is not read. A finite bias,
however low, contributes and is never skipped.

Grid. One axis, query tiles fastest: programs that run together share the K and V of a few heads, which stay in L2,
while each row of Q is read by one program only. Not two axes: the second ends at 65535, which B * H can pass.

Non-finite input. NaN in a row of q or bias stays in that row. NaN in a row of k or v reaches the queries of every tile
that reads it, also those whose bias is -inf: 0 * NaN.
"""

import functools
import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl


@triton.jit(do_not_specialize=["Nq", "S", "H", "GROUP"])
def _regional_attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    bias_ptr,
    order_ptr,
    segments_ptr,
    plan_index_ptr,
    qk_scale,
    Nq,
    S,
    H,
    GROUP,
    stride_qb: tl.int64,
    stride_qh: tl.int64,
    stride_qn: tl.int64,
    stride_kb: tl.int64,
    stride_kh: tl.int64,
    stride_kn: tl.int64,
    stride_vb: tl.int64,
    stride_vh: tl.int64,
    stride_vn: tl.int64,
    stride_ob: tl.int64,
    stride_oh: tl.int64,
    stride_on: tl.int64,
    BLEND: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    HAS_LSE: tl.constexpr,
    UPCAST: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    tl.static_assert(HAS_BIAS or not (BLEND or HAS_ORDER))
    tl.static_assert(not (BLEND and HAS_LSE))
    LOG2E: tl.constexpr = 1.4426950408889634
    LN2: tl.constexpr = 0.6931471805599453
    EXCLUDED: tl.constexpr = 0.0 if BLEND else float("-inf")
    # The maximum of a row that has met no key. Finite, so that -inf (an excluded segment) minus it is -inf and not
    # NaN: the inner loop needs no guard.
    FLOOR: tl.constexpr = -3.0e38
    LOWEST: tl.constexpr = -2.0e38

    tiles = tl.cdiv(Nq, BLOCK_M)
    pid = tl.program_id(0)
    b = (pid // tiles // H).to(tl.int64)
    h = (pid // tiles % H).to(tl.int64)
    plan = tl.load(plan_index_ptr + b).to(tl.int64)

    i = pid % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    i_live = i < Nq
    d_live = d < D
    if HAS_ORDER:
        row = tl.load(order_ptr + plan * Nq + i, mask=i_live, other=0)
    else:
        row = i

    q_tile = q_ptr + b * stride_qb + h * stride_qh + row[:, None].to(tl.int64) * stride_qn + d[None, :]
    q = tl.load(q_tile, mask=i_live[:, None] & d_live[None, :], other=0.0)
    if UPCAST:
        q = q.to(tl.float32)
    # The maximum over raw products is the maximum over scores only if the scale is positive.
    q = tl.where(qk_scale < 0, -q, q)
    qk_scale = tl.abs(qk_scale)

    k_tile = k_ptr + b * stride_kb + h // GROUP * stride_kh + n[None, :] * stride_kn + d[:, None]
    v_tile = v_ptr + b * stride_vb + h // GROUP * stride_vh + n[:, None] * stride_vn + d[None, :]
    bias_row = bias_ptr + plan * S * Nq
    segment = segments_ptr + plan * S * 3

    m = tl.full((BLOCK_M,), FLOOR, tl.float32)
    l = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    shift = tl.zeros((BLOCK_M,), tl.float32)
    if BLEND:
        blended = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    else:
        m_pad = m
        l_pad = l

    for _ in range(S):
        start = tl.load(segment)
        end = tl.load(segment + 1)
        pads = tl.load(segment + 2)
        segment += 3
        if HAS_BIAS:
            bias = tl.load(bias_row + row, mask=i_live, other=EXCLUDED)
            bias_row += Nq
            if HAS_ORDER:
                # Compared, not reduced: tl.max drops NaN, and a row whose bias is NaN must come out as NaN.
                met = tl.max((bias != EXCLUDED).to(tl.int32), 0)
                end = tl.where(met > 0, end, start)
        if BLEND:
            m = tl.zeros((BLOCK_M,), tl.float32) + tl.where(pads > 0, 0.0, FLOOR)
            l = tl.zeros((BLOCK_M,), tl.float32) + pads.to(tl.float32)
            acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        else:
            if HAS_BIAS:
                # A type's lowest number is a bias people use and not an exclusion: keep it finite in base 2.
                lowest = tl.where(bias == float("-inf"), bias, LOWEST)
                shift = tl.where(bias < LOWEST, lowest, bias) * LOG2E
            x_pad = tl.where(pads > 0, shift, float("-inf"))
            m_new = tl.maximum(m_pad, x_pad)
            l_pad = l_pad * tl.exp2(m_pad - m_new) + pads.to(tl.float32) * tl.exp2(x_pad - m_new)
            m_pad = m_new

        for n0 in range(start, end, BLOCK_N):
            n_live = n0 + n < end
            k = tl.load(k_tile + n0 * stride_kn, mask=n_live[None, :] & d_live[:, None], other=0.0)
            v = tl.load(v_tile + n0 * stride_vn, mask=n_live[:, None] & d_live[None, :], other=0.0)
            if UPCAST:
                k = k.to(tl.float32)
                v = v.to(tl.float32)
            qk = tl.dot(q, k, input_precision="ieee")
            qk = tl.where(n_live[None, :], qk, float("-inf"))
            x_max = tl.max(qk, 1) * qk_scale
            m_new = tl.maximum(m, x_max + shift)
            offset = shift - m_new
            if HAS_BIAS and not BLEND:
                # Where the bias is so large that adding it rounds the scores away: no p may pass 1.
                offset = tl.minimum(offset, -x_max, propagate_nan=tl.PropagateNan.ALL)
            p = tl.exp2(qk * qk_scale + offset[:, None])
            alpha = tl.exp2(m - m_new)
            l = l * alpha + tl.sum(p, 1)
            acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
            m = m_new

        if BLEND:
            blended += acc * (bias / tl.where(l == 0.0, 1.0, l))[:, None]

    # The rows once more, plus a zero the compiler cannot know: no plan index is negative, and the barrier keeps it
    # from merging the two loads of it. Else rows, masks and addresses in the layout of the store hold up to 20
    # registers through every loop, which is what makes the blend kernel of D 128 spill.
    tl.debug_barrier()
    again = tl.load(plan_index_ptr + b).to(tl.int64)
    i = (pid % tiles + tl.minimum(again, 0).to(tl.int32)) * BLOCK_M + tl.arange(0, BLOCK_M)
    i_live = i < Nq
    if HAS_ORDER:
        row = tl.load(order_ptr + again * Nq + i, mask=i_live, other=0)
    else:
        row = i
    if BLEND:
        out = blended
    else:
        m_all = tl.maximum(m, m_pad)
        alpha = tl.exp2(m - m_all)
        l = l * alpha + l_pad * tl.exp2(m_pad - m_all)
        l_safe = tl.where(l == 0.0, 1.0, l)
        out = acc * (alpha / l_safe)[:, None]
        if HAS_LSE:
            lse = tl.where(l == 0.0, float("-inf"), (m_all + tl.log2(l_safe)) * LN2)
            tl.store(lse_ptr + (b * H + h) * Nq + row, lse, mask=i_live)
    out_tile = out_ptr + b * stride_ob + h * stride_oh + row[:, None].to(tl.int64) * stride_on + d[None, :]
    tl.store(out_tile, out.to(out_ptr.dtype.element_ty), mask=i_live[:, None] & d_live[None, :])


class Config(NamedTuple):
    """A launch configuration: tile of queries x keys, warps of the program, depth of the K/V pipeline."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# (combine, BLOCK_D, bytes of an element) -> architecture -> configuration; 0 stands for every one not named.
# Chosen among what compiles without a spill in every variant (tests/static/triton_budget.json), not measured on cards:
# - BLOCK_N 32. Prompts are short, and a segment wastes half a key tile on average: 77 tokens are 96 keys in tiles of
#   32 and 128 in tiles of 64. Tiles of 16 rescale the output twice as often and are taken where registers ask for it.
# - BLOCK_M >= BLOCK_D with 16 rows a warp, up to D 128. Triton then gives a warp whole rows in both dots of mma.sync;
#   with fewer rows it splits D between warps, which repeat QK (1.5 times the MMAs) and exchange row sums.
# - D 64 takes half of D 128's tile: the same work a warp, finer skipping, two or three programs on a multiprocessor.
# - D 256 fits neither rule. Logit takes 64 rows, blend, with its two fp32 output tiles, 32 rows and 64 keys (with
#   which QK is not repeated). wgmma (sm_90) keeps 128 rows, with 16 keys.
# - fp32 has no tensor cores ("ieee" dots: TF32 would lose 13 bits): as many rows as registers hold.
# - Three stages of K and V hide a load behind two tiles of work; two where shared memory ends at 99 KiB.
_TABLE: dict[tuple[str, int, int], dict[int, Config]] = {
    ("logit", 16, 2): {0: Config(64, 32, 4, 3)},
    ("logit", 32, 2): {0: Config(64, 32, 4, 3)},
    ("logit", 64, 2): {0: Config(64, 32, 4, 3)},
    ("logit", 128, 2): {0: Config(128, 32, 8, 3)},
    ("logit", 256, 2): {0: Config(64, 32, 8, 2), 90: Config(128, 16, 8, 3)},
    ("blend", 16, 2): {0: Config(64, 32, 4, 3)},
    ("blend", 32, 2): {0: Config(64, 32, 4, 3)},
    ("blend", 64, 2): {0: Config(64, 32, 4, 3)},
    ("blend", 128, 2): {0: Config(128, 32, 8, 3), 120: Config(128, 16, 8, 3)},
    ("blend", 256, 2): {0: Config(32, 64, 8, 2)},
    ("logit", 16, 4): {0: Config(64, 32, 4, 2)},
    ("logit", 32, 4): {0: Config(64, 32, 4, 2)},
    ("logit", 64, 4): {0: Config(64, 32, 8, 2)},
    ("logit", 128, 4): {0: Config(64, 16, 8, 2)},
    ("logit", 256, 4): {0: Config(32, 16, 8, 2)},
    ("blend", 16, 4): {0: Config(64, 32, 4, 2)},
    ("blend", 32, 4): {0: Config(64, 32, 4, 2)},
    ("blend", 64, 4): {0: Config(64, 32, 8, 2), 100: Config(64, 16, 8, 2)},
    ("blend", 128, 4): {0: Config(64, 16, 8, 2)},
    ("blend", 256, 4): {0: Config(32, 16, 8, 2)},
}

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
COMBINES = ("logit", "blend")
# What the configurations are compiled for and checked on (tests/static/triton_budget.py).
CHECKED_ARCHS = (80, 86, 89, 90, 100, 120)
# The card whose configurations the interpreter runs.
INTERPRETER_CAPABILITY = (8, 0)
INTERPRETED = not isinstance(_regional_attention_kernel, triton.JITFunction)


class Variant(NamedTuple):
    """The compile-time switches: something is biased, something can be skipped, the caller wants the LSE."""

    has_bias: bool
    has_order: bool
    has_lse: bool


VARIANTS = {
    # Largest first: the first of each list needs every register any other does.
    "logit": tuple(Variant(b, o, e) for b, o, e in itertools.product((True, False), repeat=3) if b or not o),
    "blend": (Variant(True, True, False), Variant(True, False, False)),
}


def block_d(head_dim: int) -> int:
    """The width a head dim runs at, the excess masked: tiles are powers of two, tensor cores take 16."""
    return max(16, triton.next_power_of_2(head_dim))


def table_arch(capability: tuple[int, int]) -> int:
    """The architecture of the table for a card: same matrix instructions, no more shared memory."""
    major, minor = capability
    if major == 8:
        return 80 if minor in (0, 7) else 86
    return {9: 90, 10: 100, 11: 100}.get(major, 120)


def find_config(combine: str, dtype: torch.dtype, head_dim: int, capability: tuple[int, int]) -> Config | None:
    """The launch configuration of a call, or None where the table has none."""
    column = _TABLE.get((combine, block_d(head_dim), dtype.itemsize), {})
    return column.get(table_arch(capability), column.get(0))


def supports(dtype: torch.dtype, head_dim: int, combine: str, capability: tuple[int, int] | None = None) -> str | None:
    """None if the kernel can serve the call, else the reason it cannot. `capability` None means the interpreter."""
    if dtype not in DTYPES:
        return f"takes float16, bfloat16 and float32, not {str(dtype).removeprefix('torch.')}"
    if not 16 <= head_dim <= 256:
        return f"takes head dims from 16 to 256, not {head_dim}"
    if capability is None:
        capability = INTERPRETER_CAPABILITY
    major, minor = capability
    if major < 8:
        return f"needs compute capability 8.0 or newer, this device has {major}.{minor}"
    if find_config(combine, dtype, head_dim, capability) is None:
        return (
            f"no configuration of combine={combine!r}, head dim {head_dim}, {str(dtype).removeprefix('torch.')} "
            f"fits the registers of compute capability {major}.{minor}"
        )
    return None


def constants(combine: str, dtype: torch.dtype, head_dim: int, variant: Variant, config: Config) -> dict:
    """What a launch fixes at compile time: the kernel's constants and the compiler's options."""
    return {
        "BLEND": combine == "blend",
        "HAS_BIAS": variant.has_bias,
        "HAS_ORDER": variant.has_order,
        "HAS_LSE": variant.has_lse,
        # tl.dot of the interpreter multiplies the bit patterns of bfloat16.
        "UPCAST": INTERPRETED and dtype == torch.bfloat16,
        "D": head_dim,
        "BLOCK_D": block_d(head_dim),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        # Stated because the default changes with the version of Triton; the bias is free only inside an FMA.
        "enable_fp_fusion": True,
        # The most there is. Left alone, ptxas aims at a step of occupancy and spills a few bytes to reach it.
        "maxnreg": 255,
    }


def _qk_scale(scale: float) -> float:
    # Scores are in base 2. Zero would multiply the -inf of the keys past a segment's end into NaN.
    return scale * math.log2(math.e) or 1e-30


def _strides(t: torch.Tensor) -> list[int]:
    # The stride of an axis of length one is arbitrary. Zero, so that it never asks for a compilation of its own.
    return [stride if size > 1 else 0 for size, stride in zip(t.shape[:3], t.stride()[:3], strict=True)]


@functools.lru_cache
def _device_capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def regional_attention(q, k, v, out, lse, plan, *, scale, combine, mask) -> None:
    """Writes `out`, and `lse` unless it is None. `plan` has bias, order, segments and plan_index."""
    assert mask is None, "the triton backend takes no mask"
    B, H, Nq, D = q.shape
    capability = _device_capability(q.device) if q.is_cuda else INTERPRETER_CAPABILITY
    config = find_config(combine, q.dtype, D, capability)
    variant = Variant(plan.bias.shape[-1] > 0, plan.order.shape[-1] > 0, lse is not None)
    grid = (triton.cdiv(Nq, config.block_m) * B * H,)
    with torch.cuda.device_of(q):
        _regional_attention_kernel[grid](
            q,
            k,
            v,
            out,
            lse,
            plan.bias,
            plan.order,
            plan.segments,
            plan.plan_index,
            _qk_scale(scale),
            Nq,
            plan.segments.shape[1],
            H,
            H // k.shape[1],
            *_strides(q),
            *_strides(k),
            *_strides(v),
            *_strides(out),
            **constants(combine, q.dtype, D, variant, config),
        )


def workspace_bytes(q, plan, *, combine) -> int:
    """Bytes of temporaries of a call: none."""
    return 0


class Shipped(NamedTuple):
    """One compilation users can meet: what the table and the switches select on one architecture."""

    arch: int
    combine: str
    dtype: torch.dtype
    block_d: int
    variant: Variant
    config: Config


def shipped() -> Iterator[Shipped]:
    """Every compilation of the table, on every architecture it is checked for."""
    for arch, combine, dtype, width in itertools.product(CHECKED_ARCHS, COMBINES, DTYPES, (16, 32, 64, 128, 256)):
        config = find_config(combine, dtype, width, divmod(arch, 10))
        if config is not None:
            for variant in VARIANTS[combine]:
                yield Shipped(arch, combine, dtype, width, variant, config)


def warmup(device, dtype: torch.dtype, head_dim: int, combine: str, *, num_heads: int) -> int:
    """Compiles what calls of this kind need, with q, k, v, out in memory as [B, N, H, D], and runs nothing.

    Returns how many kernels that is: none under the interpreter.
    """
    if INTERPRETED:
        return 0
    device = torch.device(device)
    config = find_config(combine, dtype, head_dim, _device_capability(device))
    # A dtype stands for a tensor aligned to 16 bytes; integers count only by their divisibility by 16.
    strides = (0, head_dim, num_heads * head_dim)
    with torch.cuda.device(device):
        for variant in VARIANTS[combine]:
            _regional_attention_kernel.warmup(
                *[dtype] * 4,
                torch.float32 if variant.has_lse else None,
                torch.float32,
                *[torch.int32] * 3,
                1.0,
                *[2] * 4,
                *strides * 4,
                **constants(combine, dtype, head_dim, variant, config),
                grid=(1,),
            )
    return len(VARIANTS[combine])
