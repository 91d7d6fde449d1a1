"""regional_attention: every backend against the fp64 oracle, invariants, the op's registration, refusals."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from error_rule import assert_error_rule
from hypothesis import given
from strategies import Case, calls
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import anima_fast
from anima_fast import BoundPlan, NoBackendError, RegionPlan, regional_attention
from anima_fast.ops.cpu.regional_attention import regional_attention as on_cpu
from anima_fast.ops.extension import extension, unavailable
from anima_fast.reference.regional_attention import regional_attention as reference

needs_extension = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def oracle(case: Case, dtype=torch.float64, mask=None):
    """(out, lse) of the reference in `dtype`."""
    q, k, v = (x.to(dtype) for x in (case.q, case.k, case.v))
    tensors = case.plan.tensors
    if len(tensors.plan_index_host) != q.shape[0]:
        tensors = tensors._replace(plan_index_host=tensors.plan_index_host * q.shape[0])
    out = torch.empty_like(q)
    lse = torch.empty(q.shape[:3], dtype=dtype) if case.plan.combine == "logit" else None
    with torch.no_grad():
        reference(q, k, v, out, lse, tensors, scale=case.scale, combine=case.plan.combine, mask=mask)
    return out, lse


def largest_score(case: Case) -> float:
    """max |scale q·k + b| over finite biases."""
    q, k = case.q.double(), case.k.double().repeat_interleave(case.q.shape[1] // case.k.shape[1], dim=1)
    scores = float((case.scale * q @ k.transpose(-1, -2)).abs().max())
    bias = case.plan.tensors.bias
    finite = bias[bias.isfinite()]
    return scores + (float(finite.abs().max()) if finite.numel() and case.plan.combine == "logit" else 0.0)


def check(case: Case, backend: str, mask=None, **kwargs):
    """One backend's output and lse against the oracle by the error rule."""
    expected, expected_lse = oracle(case, mask=mask)
    plain, plain_lse = oracle(case, case.q.dtype, mask=mask)
    score, value = largest_score(case), float(case.v.double().abs().max())
    what = f"backend {backend!r}, {case.describe()}"
    arguments = dict(scale=case.scale, backend=backend, mask=mask, **kwargs)
    out = regional_attention(case.q, case.k, case.v, case.plan, **arguments)
    assert_error_rule(out, expected, plain, score=score, value=value, what=what)
    assert out.dtype == case.q.dtype and out.transpose(1, 2).is_contiguous()
    if expected_lse is not None:
        again, lse = regional_attention(case.q, case.k, case.v, case.plan, return_lse=True, **arguments)
        assert_error_rule(again, expected, plain, score=score, value=value, what=what)
        empty = expected_lse == -math.inf
        assert bool((lse[empty] == -math.inf).all()), f"lse of empty rows, {what}"
        assert_error_rule(
            lse[~empty], expected_lse[~empty], plain_lse[~empty], score=score, value=1.0, what=f"lse, {what}"
        )


@given(calls())
def test_torch(case):
    check(case, "torch")


@needs_extension
@given(calls())
def test_cpu(case):
    check(case, "cpu")


@given(calls(dtypes=(torch.float32, torch.float16), most_queries=60, head_dims=[16, 40, 64, 128]))
def test_triton(case):
    pytest.importorskip("triton", reason="Triton has no build for this platform")
    check(case, "triton")


@needs_extension
@pytest.mark.parametrize("isa", extension().capabilities()["isas"] if unavailable() is None else [])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("combine", ["logit", "blend"])
@pytest.mark.parametrize("head_dim", [40, 64])  # 64: rows of whole cache lines are stored past the caches
def test_every_instruction_set(isa, dtype, combine, head_dim):
    case = quadrants(combine=combine, dtype=dtype, grid=(1, 17, 23), head_dim=head_dim)
    out = torch.empty(1, 391, 2, head_dim, dtype=dtype).transpose(1, 2)
    lse = torch.empty(1, 2, 391) if combine == "logit" else None
    on_cpu(case.q, case.k, case.v, out, lse, case.plan.tensors, scale=case.scale, combine=combine, isa=isa)
    expected, expected_lse = oracle(case)
    plain, _ = oracle(case, dtype)
    value = float(case.v.abs().max())
    assert_error_rule(out, expected, plain, score=largest_score(case), value=value, what=isa)
    if lse is not None:
        torch.testing.assert_close(lse.double(), expected_lse, atol=1e-5, rtol=0)


@needs_extension
def test_an_instruction_set_this_machine_lacks_is_refused():
    case = quadrants()
    with pytest.raises(ValueError, match="isa: got 'sve'"):
        on_cpu(case.q, case.k, case.v, case.q, None, case.plan.tensors, scale=1.0, combine="logit", isa="sve")


def quadrants(*, grid=(1, 16, 16), tokens=20, pads=435, head_dim=32, heads=2, dtype=torch.float32, batch=1, **options):
    """Four quadrant regions with their prompts side by side."""
    masks = [torch.zeros(8, 8) for _ in range(4)]
    for i, mask in enumerate(masks):
        mask[4 * (i // 2) : 4 * (i // 2) + 4, 4 * (i % 2) : 4 * (i % 2) + 4] = 1
    ranges = [(i * tokens, (i + 1) * tokens) for i in range(4)]
    plan = RegionPlan.from_masks(masks, ranges, pad_counts=[pads] * 4, **options).bind(grid)
    queries = grid[0] * grid[1] * grid[2]
    q = torch.randn(batch, heads, queries, head_dim).to(dtype)
    k, v = (torch.randn(batch, heads, 4 * tokens, head_dim).to(dtype) for _ in range(2))
    return Case(q, k, v, plan, head_dim**-0.5, str(options))


BACKENDS = [
    "reference",
    "torch",
    pytest.param("cpu", marks=needs_extension),
    pytest.param("triton", marks=pytest.mark.skipif(
        anima_fast.backends()["regional_attention"]["triton"] is not None, reason="no Triton here")),
]  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
def test_folded_pads_equal_physical_zero_rows(backend):
    """The model's own form: contexts padded with zero rows, one softmax with a materialised bias."""
    case = quadrants(pads=12, tokens=5)
    k, v, bias = [], [], []
    for s in range(4):
        for x, to in ((case.k, k), (case.v, v)):
            to.append(torch.nn.functional.pad(x[:, :, 5 * s : 5 * s + 5], (0, 0, 0, 12)))
        bias.append(case.plan.tensors.bias[0, s][:, None].expand(-1, 17))
    expected = torch.nn.functional.scaled_dot_product_attention(
        case.q, torch.cat(k, 2), torch.cat(v, 2), attn_mask=torch.cat(bias, 1)
    )
    out = regional_attention(case.q, case.k, case.v, case.plan, backend=backend)
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_blend_equals_one_attention_a_region_and_a_weighted_sum(backend):
    case = quadrants(pads=0, combine="blend", mode="soft_log")
    weights = case.plan.tensors.bias[0]
    expected = sum(
        weights[s][:, None]
        * torch.nn.functional.scaled_dot_product_attention(
            case.q, case.k[:, :, 20 * s : 20 * s + 20], case.v[:, :, 20 * s : 20 * s + 20]
        )
        for s in range(4)
    )
    out = regional_attention(case.q, case.k, case.v, case.plan, backend=backend)
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bias_as_extra_columns_of_q_and_k(backend):
    """The rank-R form, an oracle of another kind: q' = [scale q, b], k' = [k, onehot(segment)]."""
    case = quadrants(pads=0)
    bias = case.plan.tensors.bias[0].T[None, None].expand(1, 2, -1, -1)
    owner = torch.nn.functional.one_hot(torch.arange(80) // 20, 4).float()[None, None].expand(1, 2, -1, -1)
    expected = torch.nn.functional.scaled_dot_product_attention(
        torch.cat([case.q * case.scale, bias], -1), torch.cat([case.k, owner], -1), case.v, scale=1.0
    )
    out = regional_attention(case.q, case.k, case.v, case.plan, backend=backend)
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_plain_plan_equals_torch_attention_over_512_padded_keys(backend):
    q, k, v = (torch.randn(2, 3, n, 64) for n in (100, 77, 77))
    plan = RegionPlan.plain(77, pad_count=435).bind((1, 10, 10))
    padded = [torch.nn.functional.pad(x, (0, 0, 0, 435)) for x in (k, v)]
    expected = torch.nn.functional.scaled_dot_product_attention(q, *padded)
    torch.testing.assert_close(regional_attention(q, k, v, plan, backend=backend), expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("combine", ["logit", "blend"])
def test_rows_with_different_plans_equal_separate_calls(backend, combine):
    """A batch of an unconditional row and two layouts is the same as each row alone."""
    first = quadrants(combine=combine, mode="hard")
    second = quadrants(combine=combine, strength=0.5, base_range=(80, 80), base_pad_count=3).plan
    plain = RegionPlan.plain(80, pad_count=7).bind((1, 16, 16))
    plans = [plain, first.plan, second]
    q, k, v = (torch.randn(4, 2, n, 32) for n in (256, 80, 80))
    index = [0, 1, 2, 1]
    together = regional_attention(q, k, v, BoundPlan.batch(plans, index), backend=backend)
    for row, p in enumerate(index):
        one = slice(row, row + 1)
        alone = regional_attention(q[one], k[one], v[one], plans[p], backend=backend)
        torch.testing.assert_close(together[one], alone, atol=1e-6, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_moving_the_segments_within_the_context_changes_nothing(backend):
    """Prompts permuted, with rows between them that belong to none (NaN, which would show if read)."""
    case = quadrants(mode="hard", tokens=6)
    starts = [30, 3, 20, 11]
    k, v = (torch.full((1, 2, 40, 32), math.nan) for _ in range(2))
    for s, start in enumerate(starts):
        k[:, :, start : start + 6] = case.k[:, :, 6 * s : 6 * s + 6]
        v[:, :, start : start + 6] = case.v[:, :, 6 * s : 6 * s + 6]
    masks = [torch.zeros(8, 8) for _ in range(4)]
    for i, mask in enumerate(masks):
        mask[4 * (i // 2) : 4 * (i // 2) + 4, 4 * (i % 2) : 4 * (i % 2) + 4] = 1
    ranges = [(s, s + 6) for s in starts]
    moved = RegionPlan.from_masks(masks, ranges, pad_counts=[435] * 4, mode="hard").bind((1, 16, 16))
    if backend == "reference":  # it forms every score, and the NaN rows stay in their columns
        k, v = k.nan_to_num(9.0), v.nan_to_num(9.0)
    out = regional_attention(case.q, k, v, moved, backend=backend)
    expected = regional_attention(case.q, case.k, case.v, case.plan, backend=backend)
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts_agree(backend):
    case = quadrants(heads=4)
    expected = regional_attention(case.q, case.k, case.v, case.plan, backend=backend)
    rows = [x.transpose(1, 2).contiguous() for x in (case.q, case.k, case.v)]
    out = regional_attention(*rows, case.plan, layout="bnhd", backend=backend)
    assert torch.equal(out.transpose(1, 2), expected)
    packed = regional_attention(*(x.flatten(2) for x in rows), case.plan, layout="packed", heads=4, backend=backend)
    assert torch.equal(packed, out.flatten(2)) and packed.is_contiguous()


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_with_fewer_key_heads(backend):
    case = quadrants(heads=4)
    k, v = case.k[:, :2], case.v[:, :2]
    expected = regional_attention(case.q, k, v, case.plan, backend=backend)
    packed = [x.transpose(1, 2).flatten(2) for x in (case.q, k, v)]
    out = regional_attention(*packed, case.plan, layout="packed", heads=4, backend=backend)
    assert torch.equal(out, expected.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_finite_hard_value_is_never_skipped(backend):
    """-80 is a bias: with scores that far apart, the suppressed segment still decides."""
    case = quadrants(pads=0, mode="hard", hard_value=-80.0)
    case.k[:, :, :20] = 30 * case.q[:, :, :1].mean(dim=2, keepdim=True)  # segment 0 scores far above
    check(case, backend)
    assert case.plan.tensors.order.shape[1] == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [-1e30, -3.4e38])
def test_a_bias_that_swallows_the_scores_gives_finite_results(backend, value):
    """Masks are often made of the type's lowest number. Where it is everywhere, no weight may exceed 1."""
    case = quadrants(pads=3)
    bias = torch.full((256, 80), value)
    bias[:128, :20] = 0
    plan = RegionPlan.from_bias(bias, grid=(1, 16, 16))
    out = regional_attention(40 * case.q, case.k, case.v, plan, backend=backend)
    assert bool(out.isfinite().all()) and float(out.abs().max()) <= float(case.v.abs().max()) * 1.0001
    expected = torch.nn.functional.scaled_dot_product_attention(
        40 * case.q[:, :, :128], case.k[:, :, :20], case.v[:, :, :20]
    )
    torch.testing.assert_close(out[:, :, :128], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_nan_and_infinity_in_the_input_are_not_hidden(backend, where):
    case = quadrants(mode="hard", grid=(1, 16, 16))
    getattr(case, where)[0, 0, 0, 0] = math.nan  # row 0: top left, segment 0
    out = regional_attention(case.q, case.k, case.v, case.plan, backend=backend)
    assert bool(out[0, 0, 0].isnan().any())
    assert not bool(out[0, 1].isnan().any()), "another head"
    if where == "q":
        assert not bool(out[0, 0, 1:].isnan().any()), "another query"


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("kind", ["bool", "additive", "one_head", "row"])
@pytest.mark.parametrize("combine", ["logit", "blend"])
def test_extra_mask(backend, kind, combine):
    case = quadrants(combine=combine, mode="hard", pads=0 if kind == "bool" else 5)
    shape = {"bool": (1, 2, 256, 80), "additive": (1, 2, 256, 80), "one_head": (256, 80), "row": (80,)}[kind]
    mask = torch.rand(shape) < 0.5 if kind == "bool" else torch.randn(shape)
    if kind == "bool":
        mask[..., 7, :] = False  # nothing left for query 7
    full = mask.expand(1, 2, 256, 80)
    expected, _ = oracle(case, mask=full)
    out = regional_attention(case.q, case.k, case.v, case.plan, mask=mask, backend=backend)
    torch.testing.assert_close(out.double(), expected, atol=2e-6, rtol=0)
    if kind == "bool":
        assert bool((out[:, :, 7] == 0).all())
        if combine == "logit":
            _, lse = regional_attention(case.q, case.k, case.v, case.plan, mask=mask, backend=backend, return_lse=True)
            assert bool((lse[:, :, 7] == -math.inf).all()) and bool(lse[:, :, :7].isfinite().all())


def test_an_extra_mask_goes_to_a_backend_that_takes_it():
    case = quadrants()
    mask = torch.zeros(256, 80)
    assert "regional_attention: torch" in anima_fast.explain(
        "regional_attention", case.q, case.k, case.v, case.plan, mask=mask
    )
    with pytest.raises(NoBackendError, match="backend 'triton' was forced but .* does not take an extra mask"):
        regional_attention(case.q, case.k, case.v, case.plan, mask=mask, backend="triton")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 2, 256, 80), (1, 0, 256, 80)])
def test_an_empty_batch_gives_an_empty_output(backend, shape):
    batch, heads, queries, keys = shape
    case = quadrants()
    q, k, v = (
        torch.randn(batch, heads, queries, 32),
        *(torch.randn(batch, max(heads, 1), keys, 32) for _ in "kv"),
    )
    out = regional_attention(q, k, v, case.plan, backend=backend)
    assert out.shape == q.shape


@pytest.mark.parametrize("backend", ["torch", pytest.param("cpu", marks=needs_extension)])
def test_circles_with_more_allowed_sets_than_the_torch_backend_keeps(backend):
    masks = []
    y, x = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    for i in range(16):
        cy, cx = 10 + 14 * (i // 4), 10 + 14 * (i % 4)
        masks.append((((y - cy) ** 2 + (x - cx) ** 2) < 169).float())
    plan = RegionPlan.from_masks(
        masks, [(3 * i, 3 * i + 3) for i in range(16)], pad_counts=[9] * 16, mode="hard", normalize_overlaps=False,
        base_range=(48, 50), base_always_allowed=False,
    ).bind((1, 64, 64))  # fmt: skip
    q, k, v = (torch.randn(1, 1, n, 16) for n in (4096, 50, 50))
    check(Case(q, k, v, plan, 0.25, "16 circles"), backend)


def test_backends_stays_a_function_after_a_call():
    """A subpackage of the same name would replace it once it is imported."""
    case = quadrants()
    regional_attention(case.q, case.k, case.v, case.plan)
    assert list(anima_fast.backends()["regional_attention"]) == ["cpu", "triton", "torch", "reference"]


def test_opcheck():
    case = quadrants()
    t = case.plan.tensors
    host = (list(t.segments_host), list(t.plan_index_host), list(t.groups_host))
    arguments = (
        case.q,
        case.k,
        case.v,
        t.bias,
        t.order,
        t.segments,
        t.plan_index,
        *host,
        0.2,
        "logit",
        None,
        "torch",
    )
    torch.library.opcheck(torch.ops.anima_fast.regional_attention.default, arguments)
    torch.library.opcheck(torch.ops.anima_fast.regional_attention_lse.default, arguments)


@pytest.mark.parametrize("backend", [None, "torch"])
def test_torch_compile_without_graph_breaks(backend):
    case = quadrants(heads=4)

    def layer(q, k, v):
        out = regional_attention(q * 2, k, v, case.plan, backend=backend)
        return out.transpose(1, 2).flatten(2) + 1

    expected = layer(case.q, case.k, case.v)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(case.q, case.k, case.v), expected)


def test_who_traces_or_transforms_a_call_sees_the_op():
    """A plain call runs at once, without torch's dispatcher; these may not."""
    case = quadrants(heads=4)

    def layer(q):
        return regional_attention(q, case.k, case.v, case.plan)

    expected = layer(case.q)
    traced = make_fx(layer)(case.q)
    assert "anima_fast.regional_attention" in traced.code
    torch.testing.assert_close(traced(case.q), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        scripted = torch.jit.trace(layer, (case.q,), check_trace=False)
    assert "anima_fast::regional_attention" in str(scripted.inlined_graph)
    torch.testing.assert_close(scripted(case.q + 1), layer(case.q + 1))
    several = torch.stack([case.q, case.q + 1])
    torch.testing.assert_close(torch.vmap(layer)(several), torch.stack([layer(q) for q in several]))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert layer(mode.from_tensor(case.q)).shape == expected.shape


def test_gradients_are_refused():
    case = quadrants()
    case.q.requires_grad_()
    with pytest.raises(ValueError, match="gradients: got a tensor that requires them; allowed: inference"):
        regional_attention(case.q, case.k, case.v, case.plan)
    with torch.no_grad():
        regional_attention(case.q, case.k, case.v, case.plan)


def test_a_gradient_through_the_raw_op_is_an_error_not_a_silent_zero():
    case = quadrants()
    t = case.plan.tensors
    host = (list(t.segments_host), list(t.plan_index_host), list(t.groups_host))
    q = case.q.clone().requires_grad_()
    with pytest.raises(ValueError, match="gradients: got a tensor that requires them; allowed: inference"):
        torch.ops.anima_fast.regional_attention(
            q, case.k, case.v, t.bias, t.order, t.segments, t.plan_index, *host, 0.2, "logit", None, ""
        )


def call(**changes):
    case = quadrants(heads=4)
    arguments = dict(q=case.q, k=case.k, v=case.v, plan=case.plan)
    arguments.update({name: change(case) if callable(change) else change for name, change in changes.items()})
    return regional_attention(**arguments)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (dict(q=[1]), TypeError, "q: got list; allowed: a tensor"),
        (dict(q=lambda c: c.q[0]), ValueError, r"q: got shape \[4, 256, 32\]; allowed: \[B, H, N, D\]"),
        (dict(k=lambda c: c.k[:, :3], v=lambda c: c.v[:, :3]), ValueError, "k: got 3 heads for 4 heads of q"),
        (dict(k=lambda c: c.k[..., :16]), ValueError, "k: got .*allowed: B = 1 and D = 32, as q"),
        (dict(v=lambda c: c.v[:, :, :9]), ValueError, "v: got .*allowed: .*as k"),
        (dict(k=lambda c: c.k.half()), ValueError, "k: got torch.float16; allowed: torch.float32, as q"),
        (dict(v=lambda c: c.v.to("meta")), ValueError, "v: got device meta; allowed: cpu, as q"),
        (dict(plan=lambda c: c.plan.to("meta")), ValueError, "plan: got a plan on meta; allowed: cpu"),
        (dict(plan=None), TypeError, "plan: got NoneType; allowed: a BoundPlan"),
        (
            dict(plan=lambda c: RegionPlan.plain(9).bind((1, 3, 3))),
            ValueError, r"plan: got a plan for grid \(1, 3, 3\), 9 queries; allowed: 256 queries, as q",
        ),
        (
            dict(plan=lambda c: RegionPlan.plain(99).bind((1, 16, 16))),
            ValueError, "plan: got ranges up to row 99; allowed: the 80 rows of k",
        ),
        (
            dict(plan=lambda c: BoundPlan.batch([c.plan], [0, 0])),
            ValueError, "plan: got a plan for a batch of 2; allowed: a batch of 1, as q",
        ),
        (dict(scale=math.inf), ValueError, "scale: got inf; allowed: a finite number"),
        (dict(layout="hbnd"), ValueError, "layout: got 'hbnd'; allowed: 'bhnd'"),
        (dict(heads=4), ValueError, "heads: got 4 with layout='bhnd'"),
        (dict(layout="packed"), ValueError, "heads: got None with layout='packed'"),
        (dict(mask=torch.zeros(255, 80)), ValueError, r"mask: got shape \[255, 80\]; allowed: broadcastable"),
        (dict(mask=torch.zeros(80).int()), ValueError, "mask: got torch.int32; allowed: bool"),
        (dict(mask=3.0), TypeError, "mask: got float; allowed: a tensor"),
        (dict(backend="cuda"), ValueError, "backend: got 'cuda'; allowed: cpu | triton | torch | reference"),
        (
            dict(q=lambda c: c.q.double(), k=lambda c: c.k.double(), v=lambda c: c.v.double(), backend="torch"),
            NoBackendError, "'torch' was forced but .* needs dtype float32, float16, bfloat16; got float64",
        ),
    ],
)  # fmt: skip
def test_bad_calls_name_the_argument(changes, error, message):
    with pytest.raises(error, match=message):
        call(**changes)


def test_packed_widths_are_checked():
    case = quadrants(heads=4)
    packed = [x.transpose(1, 2).flatten(2) for x in (case.q, case.k, case.v)]
    with pytest.raises(ValueError, match="heads: got 5 for q of width 128; allowed: a divisor"):
        regional_attention(*packed, case.plan, layout="packed", heads=5)
    with pytest.raises(ValueError, match="k: got width 100; allowed: a multiple of the head dim 32"):
        regional_attention(packed[0], packed[1][..., :100], packed[2], case.plan, layout="packed", heads=4)


def test_lse_of_a_blend_is_refused():
    with pytest.raises(ValueError, match="return_lse: got True with combine='blend'"):
        case = quadrants(combine="blend")
        regional_attention(case.q, case.k, case.v, case.plan, return_lse=True)


def test_no_backend_lists_every_reason():
    q, k, v = (torch.zeros(1, 1, n, 300, dtype=torch.complex64) for n in (256, 80, 80))
    with pytest.raises(NoBackendError) as caught:
        regional_attention(q, k, v, quadrants().plan)
    for backend in ("cpu", "triton", "torch", "reference"):
        assert f"  {backend}: " in str(caught.value)
    assert "got complex64" in str(caught.value)


def test_a_head_dim_no_fast_backend_takes_goes_to_the_reference():
    q, k, v = (torch.randn(1, 1, n, 300) for n in (256, 80, 80))
    assert "regional_attention: reference" in anima_fast.explain("regional_attention", q, k, v, quadrants().plan)
    check(Case(q, k, v, quadrants().plan, 0.1, "D 300"), "reference")


def test_fp64_goes_to_the_reference():
    case = quadrants()
    out = regional_attention(case.q.double(), case.k.double(), case.v.double(), case.plan)
    torch.testing.assert_close(out, oracle(case)[0], atol=1e-14, rtol=0)


@pytest.mark.parametrize("backend", ["torch", pytest.param("cpu", marks=needs_extension)])
@pytest.mark.parametrize("combine", ["logit", "blend"])
def test_estimate_bytes_covers_what_a_call_allocates(backend, combine):
    """torch's own account of a call's allocations, beyond the output, is at most the estimate, and near it."""
    from torch.profiler import ProfilerActivity, profile

    case = quadrants(grid=(1, 64, 64), heads=8, head_dim=64, combine=combine, tokens=77)
    regional_attention(case.q, case.k, case.v, case.plan, backend=backend)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        regional_attention(case.q, case.k, case.v, case.plan, backend=backend)
    level = peak = 0
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "[memory]":
            level += event.nbytes()
            peak = max(peak, level)
    used = peak - case.q.numel() * 4
    tensors = sum(x.numel() * x.element_size() for x in case.plan.tensors[:4])
    estimate = case.plan.estimate_bytes(heads=8, head_dim=64, backend=backend) - tensors
    assert 0 < used <= estimate, (used, estimate)
    assert estimate <= 4 * used, (used, estimate)
