"""The Triton kernel of regional attention, run by Triton's interpreter, against the formulas in float64.

Every tensor the kernel is given lies inside NaN: before, after and between the rows of q, k, v, bias and out, in rows
of k that no segment names, in the output before it is written. A NaN that comes through is an access out of place.
"""

import math
import os
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="Triton has no build for this platform")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 set before Triton is imported", allow_module_level=True)

from anima_fast.kernels import regional_attention as kernel
from error_rule import assert_error_rule

NAN, INF = float("nan"), float("inf")


def guarded(shape, dtype, permute=(0, 1, 2, 3)):
    """(view, buffer): a NaN view with unit last stride and a NaN border all around, in memory in `permute` order."""
    buffer = torch.full([shape[axis] + 2 for axis in permute], NAN, dtype=dtype)
    view = buffer[tuple(slice(1, -1) for _ in permute)]
    return view.permute([permute.index(axis) for axis in range(len(shape))]), buffer


def guarded_flat(shape, fill, dtype):
    """A contiguous tensor with 64 guard elements on both sides."""
    size = math.prod(shape)
    return torch.full((size + 128,), fill, dtype=dtype)[64 : 64 + size].view(shape)


def formula(q, k, v, plan, scale, combine, dtype):
    """out and lse by the formulas, materialised, in the given precision; the largest score besides."""
    q, k, v, bias = (t.to(dtype) for t in (q, k, v, plan.bias))
    B, H, Nq, D = q.shape
    out = torch.zeros(B, H, Nq, D, dtype=dtype)
    lse = torch.zeros(B, H, Nq, dtype=dtype)
    largest = 0.0
    for b in range(B):
        p = int(plan.plan_index[b])
        for h in range(H):
            kv = h // (H // k.shape[1])
            # One softmax over all segments (logit), or one for each (blend).
            scores, values = [], []
            for s, (start, end, pads) in enumerate(plan.segments[p].tolist()):
                x = scale * (q[b, h] @ k[b, kv, start:end].T)
                sink = int(pads > 0)
                x = torch.cat([x, torch.full((Nq, sink), math.log(max(pads, 1)), dtype=dtype)], 1)
                y = torch.cat([v[b, kv, start:end], torch.zeros(sink, D, dtype=dtype)])
                if combine == "logit":
                    scores.append(x + bias[p, s, :, None] if bias.shape[-1] else x)
                    values.append(y)
                else:
                    weight = bias[p, s, :, None]
                    out[b, h] += torch.where(weight == 0, 0, weight * softmax(x, y)[0])
                largest = max(largest, float(x.double().nan_to_num().abs().max()) if x.numel() else 0.0)
            if combine == "logit":
                out[b, h], lse[b, h] = softmax(torch.cat(scores, 1), torch.cat(values))
    return out, lse, largest


def softmax(x, y):
    if x.shape[1] == 0:
        return x.new_zeros(x.shape[0], y.shape[1]), x.new_full((x.shape[0],), -INF)
    m = x.amax(1, keepdim=True)
    m = torch.where(m == -INF, 0, m)
    p = torch.exp(x - m)
    Z = p.sum(1, keepdim=True)
    out = torch.where(Z == 0, 0, p @ y / torch.where(Z == 0, 1, Z))
    return out, (m + torch.log(Z))[:, 0]


def assert_close(got, oracle, reference, score, value):
    """The error rule where the oracle is finite, -inf where it is -inf."""
    finite = oracle.isfinite()
    assert torch.equal(got[~finite].double(), oracle[~finite])
    assert_error_rule(got[finite], oracle[finite], reference[finite], score=score, value=value)


class Case:
    """A call: what it is made of, filled with seeded random numbers; `check()` runs and compares it."""

    def __init__(
        self, combine="logit", dtype=torch.float32, *, segments=(((0, 40, 9), (40, 77, 0)),), plan_index=(0,),
        H=2, Hk=None, Nq=None, D=32, scale=None, bias="soft", order=False, lse=True, layout=(0, 2, 1, 3), seed=0,
    ):  # fmt: skip
        self.combine, self.dtype = combine, dtype
        config = kernel.find_config(combine, dtype, D, kernel.INTERPRETER_CAPABILITY)
        Nq = config.block_m + 5 if Nq is None else Nq
        Hk = Hk or H
        self.scale = D**-0.5 if scale is None else scale
        B, P, S = len(plan_index), len(segments), max(len(plan) for plan in segments)
        Nk = max((end for plan in segments for _, end, _ in plan), default=0) + 3
        g = torch.Generator().manual_seed(seed)

        def rand(shape):
            view, _ = guarded(shape, dtype, layout)
            return view.copy_(torch.randn(shape, generator=g))

        self.q, self.k, self.v = rand((B, H, Nq, D)), rand((B, Hk, Nk, D)), rand((B, Hk, Nk, D))
        self.out, self.buffer = guarded((B, H, Nq, D), dtype, (0, 2, 1, 3))
        self.lse = guarded_flat((B, H, Nq), NAN, torch.float32) if lse and combine == "logit" else None

        table = torch.zeros(P, S, 3, dtype=torch.int32)
        for p, plan in enumerate(segments):
            table[p, : len(plan)] = torch.tensor(plan, dtype=torch.int32)
        for b, p in enumerate(plan_index):
            named = torch.zeros(Nk, dtype=torch.bool)
            for start, end, _ in segments[p]:
                named[start:end] = True
            self.k[b, :, ~named] = NAN
            self.v[b, :, ~named] = NAN

        values = torch.randn(P, S, Nq, generator=g) * 2
        if bias == "hard":
            # Each query lets one segment in and some let in two; sorted by `order`, tiles are of one kind.
            allowed = torch.randint(S, (P, Nq), generator=g)
            other = torch.randint(3 * S, (P, Nq), generator=g)
            s = torch.arange(S)[None, :, None]
            values = torch.where((s == allowed[:, None]) | (s == other[:, None]), 0.0, -INF)
        if combine == "blend":
            weight = values.exp()
            values = weight / weight.sum(1, keepdim=True)
        biased = bias != "none" or combine == "blend"
        self.bias = guarded_flat((P, S, Nq if biased else 0), NAN, torch.float32).copy_(
            values[..., : Nq if biased else 0]
        )
        # A leaked guard of the order sends the kernel to the NaN row after the last.
        self.order = guarded_flat((P, Nq if order else 0), Nq, torch.int32)
        if order:
            kinds = ((values == (0 if combine == "blend" else -INF)) * 2 ** torch.arange(S)[:, None]).sum(1)
            self.order.copy_(kinds.argsort(dim=1, stable=True))
        self.segments = table
        self.plan_index = torch.tensor(plan_index, dtype=torch.int32)

    @property
    def plan(self):
        return SimpleNamespace(bias=self.bias, order=self.order, segments=self.segments, plan_index=self.plan_index)

    def run(self):
        kernel.regional_attention(
            self.q, self.k, self.v, self.out, self.lse, self.plan, scale=self.scale, combine=self.combine, mask=None
        )  # fmt: skip
        return self.out

    def check(self):
        args = (self.q, self.k, self.v, self.plan, self.scale, self.combine)
        oracle, oracle_lse, largest = formula(*args, torch.float64)
        lowp, _, _ = formula(*args, self.dtype)
        self.run()
        assert_close(self.out, oracle, lowp, largest, float(self.v.double().nan_to_num().abs().max()))
        if self.lse is not None:
            assert_close(self.lse, oracle_lse, oracle_lse, largest, 1.0)
        self.out.fill_(NAN)
        assert self.buffer.isnan().all(), "written outside the output"


DTYPES = pytest.mark.parametrize("dtype", kernel.DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
COMBINES = pytest.mark.parametrize("combine", kernel.COMBINES)


@DTYPES
@pytest.mark.parametrize(
    ("combine", "variant"), [(combine, v) for combine in kernel.COMBINES for v in kernel.VARIANTS[combine]]
)
def test_every_variant(combine, variant, dtype):
    """Each set of compile-time switches, with two plans in a batch, grouped heads and a segment of only pads."""
    segments = (((2, 35, 4), (35, 36, 0), (0, 0, 7)), ((0, 40, 0),))
    bias = "hard" if variant.has_order else "soft" if variant.has_bias else "none"
    case = Case(
        combine, dtype, segments=segments, plan_index=(1, 0), Hk=1,
        bias=bias, order=variant.has_order, lse=variant.has_lse,
    )  # fmt: skip
    assert (case.bias.numel() > 0, case.order.numel() > 0, case.lse is not None) == variant
    case.check()


def table_rows():
    """Every different configuration of the table, under a capability that selects it."""
    rows = {}
    for arch, combine, dtype, width, _, config in kernel.shipped():
        if dtype != torch.bfloat16:
            rows.setdefault((combine, dtype, width, config), divmod(arch, 10))
    names = ("-".join(map(str, (combine, dtype, width, *config))) for combine, dtype, width, config in rows)
    return [
        pytest.param(*row, capability, id=name) for (row, capability), name in zip(rows.items(), names, strict=True)
    ]


@pytest.mark.parametrize(("combine", "dtype", "D", "config", "capability"), table_rows())
def test_every_configuration(monkeypatch, combine, dtype, D, config, capability):
    monkeypatch.setattr(kernel, "INTERPRETER_CAPABILITY", capability)
    assert kernel.find_config(combine, dtype, D, capability) == config
    n = config.block_n
    Case(combine, dtype, segments=(((0, n + 1, 3), (n + 1, n + 9, 0)),), D=D, H=1, bias="hard", order=True).check()


@COMBINES
@pytest.mark.parametrize("D", [16, 17, 24, 40, 72, 80, 96, 160, 200])
def test_head_dims_between_powers_of_two(combine, D):
    Case(combine, torch.float16, D=D, H=1, Nq=9).check()


@COMBINES
@pytest.mark.parametrize("ahead", [-5, -1, 0, 1])
def test_query_counts(combine, ahead):
    """Nq around the tile, and one query."""
    block_m = kernel.find_config(combine, torch.float32, 32, kernel.INTERPRETER_CAPABILITY).block_m
    Case(combine, Nq=max(1, ahead + (block_m if ahead > -5 else 0)), order=True, bias="hard", H=1).check()


def segment_lists(n):
    return {
        "length 1": [(0, 1, 0), (1, 2, 3)],
        "one less than a tile": [(0, n - 1, 5), (n - 1, 2 * n - 2, 0)],
        "one tile": [(0, n, 0), (n, 2 * n, 2)],
        "one more than a tile": [(0, n + 1, 1), (n + 1, 2 * n + 2, 0)],
        "several tiles": [(0, 3 * n + 7, 435)],
        "gaps and any order": [(50, 60, 0), (3, 20, 4), (30, 41, 0)],
        "empty among others": [(0, 0, 0), (0, 12, 2), (12, 12, 0), (12, 20, 0), (20, 20, 0)],
        "pads only among others": [(0, 0, 9), (0, 12, 0)],
        "pads only": [(0, 0, 9), (4, 4, 1)],
        "nothing at all": [(0, 0, 0), (3, 3, 0)],
    }


@COMBINES
@pytest.mark.parametrize("name", segment_lists(32))
def test_segments(combine, name):
    n = kernel.find_config(combine, torch.float32, 32, kernel.INTERPRETER_CAPABILITY).block_n
    case = Case(combine, segments=[segment_lists(n)[name]], H=1)
    case.check()
    if name == "pads only" or "nothing" in name:
        assert (case.run() == 0).all()
    if "nothing" in name and combine == "logit":
        assert (case.lse == -INF).all()


@pytest.mark.parametrize("layout", [(0, 1, 2, 3), (0, 2, 1, 3), (1, 0, 2, 3), (2, 1, 0, 3)])
def test_layouts(layout):
    Case(layout=layout, plan_index=(0, 0), H=4, Hk=2, Nq=11).check()


def test_broadcast_keys():
    """One context expanded over the batch: stride 0."""
    case = Case(plan_index=(0, 0, 0), Nq=11)
    case.k, case.v = (t[:1].expand_as(t) for t in (case.k, case.v))
    case.check()


@COMBINES
@pytest.mark.parametrize("scale", [0.0, -0.7, 40.0])
def test_scale(combine, scale):
    Case(combine, scale=scale, Nq=11, H=1, D=16).check()


@pytest.mark.parametrize("lse", [True, False])
def test_scores_far_below_zero(lse):
    """The tail of a key tile reads as zeros: a score of 0 among scores near -1000 would empty the row."""
    case = Case(Nq=11, H=1, D=16, bias="none", scale=30.0, lse=lse, segments=[[(0, 33, 0)]])
    case.q.fill_(2.0)
    case.k[:, :, :33] = -1.0 + 0.001 * case.k[:, :, :33]
    case.check()


@pytest.mark.parametrize("order", [True, False])
def test_row_that_excludes_every_segment(order):
    """The plan never binds one, but the kernel must not turn it into NaN."""
    case = Case(bias="hard", order=order, Nq=70)
    case.bias[0, :, 7] = -INF
    case.check()
    assert (case.run()[:, :, 7] == 0).all() and (case.lse[:, :, 7] == -INF).all()


@COMBINES
def test_any_permutation_is_an_order(combine):
    """The order decides what can be skipped, never the result."""
    case = Case(combine, bias="hard", order=True, Nq=150, plan_index=(1, 0), segments=[[(0, 20, 3), (20, 40, 0)]] * 2)
    for p in range(2):
        case.order[p] = torch.randperm(150, generator=torch.Generator().manual_seed(p))
    case.check()


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")  # of the interpreter's numpy
@COMBINES
@pytest.mark.parametrize("source", ["q", "bias", "bias in a tile that excludes"])
def test_nan_stays_in_its_row(combine, source):
    case = Case(combine, bias="hard", order=True)
    row = int(case.order[0, 3])
    if source == "q":
        case.q[:, :, row] = NAN
    elif source == "bias":
        case.bias[0, 1, row] = NAN
    else:
        # Nobody else in the launch meets this segment: it must still not be skipped.
        case.bias[0, 1] = 0.0 if combine == "blend" else -INF
        case.bias[0, 0] = 1.0 if combine == "blend" else 0.0
        case.bias[0, 1, row] = NAN
    out = case.run()
    expected = torch.zeros_like(out, dtype=torch.bool)
    expected[:, :, row] = True
    assert torch.equal(out.isnan(), expected)


@COMBINES
def test_excluded_segments_are_not_read(combine):
    """Half of the queries meet the second segment, whose keys are NaN. Sorted, the tiles of the others miss it."""
    block_m = kernel.find_config(combine, torch.float32, 32, kernel.INTERPRETER_CAPABILITY).block_m
    case = Case(combine, bias="hard", order=True, Nq=2 * block_m, segments=[[(0, 20, 3), (20, 40, 0)]])
    on, off = (1.0, 0.0) if combine == "blend" else (0.0, -INF)
    second = torch.rand(2 * block_m, generator=torch.Generator().manual_seed(2)).argsort() < block_m
    case.bias[0, 0], case.bias[0, 1] = torch.where(second, off, on), torch.where(second, on, off)
    case.order[0] = second.int().argsort(stable=True)
    case.k[:, :, 20:40] = NAN
    out = case.run()
    assert not out[:, :, ~second].isnan().any() and out[:, :, second].isnan().all()


@pytest.mark.parametrize(("combine", "value"), [("logit", -80.0), ("logit", -1e4), ("blend", 1e-30)])
def test_finite_bias_is_never_skipped(combine, value):
    case = Case(combine, bias="hard", order=True, Nq=20, segments=[[(0, 20, 0), (20, 40, 0)]])
    case.bias[0, 1] = value
    case.bias[0, 0] = 1.0 if combine == "blend" else 0.0
    case.check()
    case.k[:, :, 20:40] = NAN
    assert case.run().isnan().all()


def test_equal_finite_bias_is_no_bias():
    case = Case(Nq=20)
    case.bias.fill_(-80.0)
    case.check()


@pytest.mark.parametrize("combine", kernel.COMBINES)
def test_no_queries(combine):
    case = Case(combine, Nq=0)
    assert case.run().numel() == 0


def test_table_is_complete_or_says_why():
    for combine in kernel.COMBINES:
        for dtype in kernel.DTYPES:
            for D in (16, 32, 64, 100, 128, 256):
                for capability in (None, (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)):
                    reason = kernel.supports(dtype, D, combine, capability)
                    found = kernel.find_config(combine, dtype, D, capability or kernel.INTERPRETER_CAPABILITY)
                    assert (reason is None) == (found is not None)
                    if dtype != torch.float32 and D in (64, 128, 256):
                        assert reason is None


def test_reasons():
    assert "float64" in kernel.supports(torch.float64, 64, "logit", (9, 0))
    assert "head dims from 16 to 256, not 8" in kernel.supports(torch.float16, 8, "logit", (9, 0))
    assert "320" in kernel.supports(torch.float16, 320, "logit", (9, 0))
    assert "8.0 or newer, this device has 7.5" in kernel.supports(torch.float16, 64, "logit", (7, 5))


def test_unknown_cards_use_the_nearest_checked_ones():
    expected = {
        (8, 0): 80,
        (8, 7): 80,
        (8, 6): 86,
        (8, 9): 86,
        (9, 0): 90,
        (10, 0): 100,
        (10, 3): 100,
        (11, 0): 100,
    }
    expected |= {(12, 0): 120, (12, 1): 120, (13, 0): 120}
    assert {capability: kernel.table_arch(capability) for capability in expected} == expected


def test_warmup_has_nothing_to_compile_in_the_interpreter():
    assert kernel.warmup("cpu", torch.float16, 128, "logit", num_heads=16) == 0
