"""RegionPlan: the bias and weights it forms, against the formulas written out; binding, cropping, batching, files."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import region_plans

import anima_fast
from anima_fast import BoundPlan, RegionPlan
from anima_fast.bound_plan import iterate_groups

INF = math.inf


def halves(height=8, width=8):
    left = torch.zeros(height, width)
    left[:, : width // 2] = 1
    return [left, 1 - left]


def plan_of(masks=None, ranges=((0, 3), (3, 7)), **options):
    return RegionPlan.from_masks(halves() if masks is None else masks, list(ranges), **options)


def rows_of(bound):
    """Bias or weights [S, Nq] of a single plan, zeros where nothing is biased."""
    t = bound.tensors
    return t.bias[0] if t.bias.shape[2] else torch.zeros(t.segments.shape[1], bound.queries)


def test_soft_log_is_strength_times_log_weight():
    mask = torch.tensor([[1.0, 0.5], [1e-6, 0.25]])
    plan = plan_of([mask, 1 - mask], mode="soft_log", eps=1e-3, strength=0.35, region_strengths=[1, 2])
    expected = torch.stack([mask.flatten(), 1 - mask.flatten()]).clamp(min=1e-3).log() * torch.tensor([[0.35], [0.7]])
    torch.testing.assert_close(rows_of(plan.bind((1, 2, 2))), expected)


def test_hard_excludes_at_half_and_below():
    mask = torch.tensor([[0.6, 0.5], [0.4, 1.0]])
    rows = rows_of(plan_of([mask, torch.ones(2, 2)], mode="hard", normalize_overlaps=False).bind((1, 2, 2)))
    assert rows.tolist() == [[0, -INF, -INF, 0], [0, 0, 0, 0]]


def test_a_finite_hard_value_is_scaled_by_the_strength_and_excludes_nothing():
    bound = plan_of(mode="hard", hard_value=-80, strength=0.35).bind((1, 2, 2))
    torch.testing.assert_close(rows_of(bound), torch.tensor([[0, -28.0] * 2, [-28.0, 0] * 2]))
    assert bound.tensors.order.shape == (1, 0)


@pytest.mark.parametrize("mode", ["soft_log", "hard"])
@pytest.mark.parametrize("base_always_allowed", [True, False])
def test_no_strength_means_no_bias_in_every_mode(mode, base_always_allowed):
    options = dict(mode=mode, base_range=(7, 9), base_always_allowed=base_always_allowed)
    assert plan_of(strength=0, **options).bind((1, 4, 4)).tensors.bias.shape == (1, 3, 0)
    rows = rows_of(plan_of(region_strengths=[0, 1], **options).bind((1, 4, 4)))
    assert bool((rows[0] == 0).all()) and bool((rows[1] != 0).any())


@pytest.mark.parametrize(
    ("mode", "hard_value", "lowest"),
    [("soft_log", None, 0.5 * math.log(1e-2)), ("hard", None, -INF), ("hard", -80, -40)],
)
@pytest.mark.parametrize("unmasked_to_base", [True, False])
def test_base_prompt_where_no_region_counts(mode, hard_value, lowest, unmasked_to_base):
    mask = torch.tensor([[1.0, 0.0]])
    plan = RegionPlan.from_masks(
        [mask], [(0, 3)], base_range=(3, 5), mode=mode, hard_value=hard_value, eps=1e-2, strength=0.5,
        base_always_allowed=False, unmasked_to_base=unmasked_to_base,
    )  # fmt: skip
    base = rows_of(plan.bind((1, 1, 2)))[1].tolist()
    # With both off, hard excludes everything from the second query: then all are allowed, unbiased.
    expected = 0.0 if unmasked_to_base or lowest == -INF else lowest
    assert base == pytest.approx([lowest, expected])


def test_a_query_that_every_segment_excludes_attends_to_all():
    bound = plan_of([torch.zeros(2, 2)] * 2, mode="hard").bind((1, 2, 2))
    assert rows_of(bound).tolist() == [[0] * 4] * 2
    assert bound.tensors.order.shape == (1, 0)


def test_an_empty_prompt_does_not_count_as_allowed():
    """Only the empty region covers the left: its queries attend to the other prompt instead of to nothing."""
    bound = plan_of(ranges=[(0, 0), (0, 7)], mode="hard").bind((1, 2, 2))
    assert rows_of(bound)[1].tolist() == [0] * 4
    assert plan_of(ranges=[(0, 0), (0, 7)], pad_counts=[5, 0], mode="hard").bind((1, 2, 2)).tensors.order.shape[1] == 4


def test_overlaps_are_normalised():
    masks = [torch.full((2, 2), 0.9), torch.full((2, 2), 0.6), torch.tensor([[0.0, 0.5], [0.0, 0.0]])]
    ranges = [(0, 1), (1, 2), (2, 3)]
    weights = plan_of(masks, ranges).token_weights((1, 2, 2))
    torch.testing.assert_close(weights.sum(dim=0), torch.ones(2, 2, dtype=torch.float64), atol=1e-6, rtol=0)
    torch.testing.assert_close(weights[0] / weights[1], torch.full((2, 2), 1.5, dtype=torch.float64), atol=1e-6, rtol=0)
    free = plan_of(masks, ranges, normalize_overlaps=False).token_weights((1, 2, 2))
    torch.testing.assert_close(free.float(), torch.stack(masks))


def test_a_higher_priority_takes_its_pixels():
    top = torch.zeros(4, 4)
    top[:, :2] = 1
    soft = torch.full((2, 2), 0.5)  # another size
    below = torch.ones(4, 4)
    plan = plan_of([below, top, soft], [(0, 1), (1, 2), (2, 3)], priorities=[0, 2, 1], normalize_overlaps=False)
    weights = plan.token_weights((1, 4, 4)).float()
    torch.testing.assert_close(weights[1], top)
    torch.testing.assert_close(weights[2], 0.5 * (1 - top))
    torch.testing.assert_close(weights[0], 0.5 * (1 - top))
    same = plan_of([below, top], priorities=[1, 1], normalize_overlaps=False).token_weights((1, 4, 4)).float()
    torch.testing.assert_close(same, torch.stack([below, top]))


def test_blend_weights():
    mask = torch.tensor([[1.0, 0.5, 0.2, 0.0]])
    options = dict(base_range=(3, 5), combine="blend")
    rows = rows_of(RegionPlan.from_masks([mask], [(0, 3)], **options).bind((1, 1, 4)))
    torch.testing.assert_close(rows, torch.cat([mask, 1 - mask]))
    rows = rows_of(RegionPlan.from_masks([mask], [(0, 3)], base_weight=0.5, strength=2, **options).bind((1, 1, 4)))
    u, b = 2 * mask, (1 - 2 * mask).clamp(min=0.5)
    torch.testing.assert_close(rows, torch.cat([u, b]) / (u + b))
    rows = rows_of(RegionPlan.from_masks([mask], [(0, 3)], mode="hard", **options).bind((1, 1, 4)))
    assert rows.tolist() == [[1, 0, 0, 0], [0, 1, 1, 1]]


def test_blend_without_any_weight_is_equal_weights():
    rows = rows_of(plan_of([torch.zeros(1, 2), torch.tensor([[0.0, 0.3]])], combine="blend").bind((1, 1, 2)))
    torch.testing.assert_close(rows, torch.tensor([[0.5, 0], [0.5, 1]]))


def test_pads_strip_leaves_pads_out():
    plan = plan_of(pad_counts=[5, 6], pads="strip")
    assert plan.bind((1, 2, 2)).segments == ((0, 3, 0), (3, 7, 0))
    assert plan_of(pad_counts=[5, 6]).bind((1, 2, 2)).segments == ((0, 3, 5), (3, 7, 6))


@given(region_plans(30), st.integers(1, 3), st.integers(1, 9), st.integers(1, 9))
def test_every_bound_plan_is_well_formed(plan_and_text, frames, height, width):
    plan, text = plan_and_text
    bound = plan.bind((frames, height, width))
    t, queries = bound.tensors, frames * height * width
    rows = rows_of(bound)
    present = torch.tensor([e > s or p > 0 for s, e, p in bound.segments])
    assert not bool(rows.isnan().any()), text
    if bound.combine == "blend":
        torch.testing.assert_close(rows.sum(dim=0), torch.ones(queries))
        live = rows > 0
    else:
        live = (rows > -INF) & present[:, None]
        assert bool((rows[present] <= 0).all()), text
    assert bool(live.any(dim=0).all()), f"a query without a segment, {text}"
    order = t.order[0] if t.order.shape[1] else torch.arange(queries)
    assert order.sort().values.tolist() == list(range(queries))
    end = 0
    for _, start, stop, flat, segments in iterate_groups(t.groups_host):
        assert start == end < stop
        end = stop
        members = order[start:stop].long()
        expected = torch.zeros(len(present), dtype=torch.bool)
        expected[list(segments)] = True
        assert bool((live[:, members] == expected[:, None]).all()), text
        if flat:
            assert bool((rows[list(segments)][:, members] == 0).all()), text
    assert end == queries
    if frames > 1:  # frames repeat the weights
        torch.testing.assert_close(rows[:, : height * width], rows[:, -height * width :])


@given(region_plans(30), st.data())
def test_the_crop_of_the_plan_is_the_crop_of_the_whole(plan_and_text, data):
    plan, _ = plan_and_text
    rows, columns = data.draw(st.integers(1, 8)), data.draw(st.integers(1, 8))
    top, left = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, columns - 1))
    bottom, right = data.draw(st.integers(top + 1, rows)), data.draw(st.integers(left + 1, columns))
    tile = plan.crop((top / rows, left / columns, bottom / rows, right / columns))
    whole = plan.token_weights((1, rows, columns))[:, top:bottom, left:right]
    part = tile.token_weights((1, bottom - top, right - left))
    torch.testing.assert_close(part, whole, atol=1e-6, rtol=0)


def test_crop_of_a_crop():
    plan = plan_of([torch.rand(16, 16), torch.rand(16, 16)])
    twice = plan.crop((0, 0.5, 1, 1)).crop((0.5, 0, 1, 1)).token_weights((1, 4, 4))
    torch.testing.assert_close(twice, plan.token_weights((1, 8, 8))[:, 4:, 4:], atol=1e-6, rtol=0)


def test_binding_at_twice_the_resolution_averages_to_the_first():
    plan = plan_of([torch.rand(48, 48), torch.rand(48, 48)], normalize_overlaps=False)
    fine = plan.token_weights((1, 16, 12)).reshape(2, 8, 2, 6, 2).mean(dim=(2, 4))
    torch.testing.assert_close(plan.token_weights((1, 8, 6)), fine, atol=1e-6, rtol=0)


def test_canvas_of_an_odd_latent():
    mask = torch.zeros(33, 16)
    mask[32] = 1
    weights = RegionPlan.from_masks([mask], [(0, 1)]).token_weights((1, 17, 8), canvas=(16.5, 8))
    assert weights[0, :16].max() == 0 and weights[0, 16].min() == 1


def test_more_than_62_segments_sort_correctly():
    masks = [torch.zeros(1, 70) for _ in range(70)]
    for i, mask in enumerate(masks):
        mask[0, 69 - i] = 1
    bound = RegionPlan.from_masks(masks, [(i, i + 1) for i in range(70)], mode="hard").bind((1, 1, 70))
    groups = iterate_groups(bound.tensors.groups_host)
    assert len(groups) == 70
    for _, start, _, _, segments in groups:
        assert segments == (69 - int(bound.tensors.order[0, start]),)


def test_to_moves_every_tensor():
    moved = plan_of(mode="hard").bind((1, 4, 4)).to("meta")
    assert {x.device.type for x in moved.tensors[:4]} == {"meta"} == {moved.device.type}


def test_repr_says_what_matters():
    plan = plan_of(pad_counts=[5, 6], base_range=(7, 9), strength=0.35).crop((0, 0, 1, 0.5))
    text = repr(plan)
    for part in ("2 regions", "soft_log eps=0.0001", "strength 0.35", "crop (0, 0, 1, 0.5)", "tokens [3, 7) + 6 pads",
                 "8 x 8 covering 50.0 %", "base:     tokens [7, 9) + 0 pads, everywhere"):  # fmt: skip
        assert part in text, text
    text = repr(plan_of(mode="hard").bind((1, 4, 4)))
    for part in (
        "grid 1 x 4 x 4 = 16 queries",
        "plan 0 segment 1: tokens [3, 7) + 0 pads, 50.0 % of the queries",
    ):
        assert part in text, text


def test_estimate_bytes_grows_with_the_picture_not_with_its_square():
    plan = plan_of([torch.rand(64, 64), torch.rand(64, 64)], ranges=[(0, 512), (512, 1024)])
    small, large = (plan.estimate_bytes((1, n, n), backend="torch") for n in (64, 128))
    assert small < large < 2 * small
    triton = plan.estimate_bytes((1, 64, 64), backend="triton")
    assert triton == sum(x.nbytes for x in plan.bind((1, 64, 64)).tensors[:4])
    assert plan.estimate_bytes((1, 64, 64), backend="reference") > 16 * 4096 * 1024 * 4


# Batches


def test_batch_pads_short_plans_with_absent_segments():
    plain = RegionPlan.plain(4, pad_count=9).bind((1, 4, 4))
    batch = BoundPlan.batch([plain, plan_of(mode="hard").bind((1, 4, 4))], [0, 1, 0])
    assert batch.segments == ((0, 4, 9), (0, 0, 0), (0, 3, 0), (3, 7, 0))
    assert batch.tensors.plan_index.tolist() == [0, 1, 0]
    assert batch.tensors.bias[0].tolist() == [[0] * 16, [-INF] * 16]


def test_a_plain_row_joins_a_blend_batch():
    plain = RegionPlan.plain(4).bind((1, 4, 4))
    batch = BoundPlan.batch([plan_of([torch.rand(4, 4)] * 2, combine="blend").bind((1, 4, 4)), plain], [1, 0])
    assert batch.combine == "blend"
    assert batch.tensors.bias[1].tolist() == [[1] * 16, [0] * 16]


@pytest.mark.parametrize(
    ("plans", "index", "error", "message"),
    [
        ([], [0], ValueError, "plans: got an empty sequence"),
        (["b"], [0], TypeError, r"plans\[0\]: got str; allowed: a BoundPlan"),
        (["p4", "p3"], [0], ValueError, r"plans\[1\]: got grid \(1, 3, 3\); allowed: \(1, 4, 4\)"),
        (["p4"], [1], ValueError, r"plan_index: got \[1\]; allowed: one number from 0 to 0 a row"),
        (["p4"], [], ValueError, "plan_index: got"),
        (["p4", "blend"], [0, 1], ValueError, "got both combine='logit' and 'blend'"),
    ],
)
def test_bad_batches(plans, index, error, message):
    mask = torch.rand(4, 4)
    known = {
        "p4": plan_of([mask, 1 - mask]).bind((1, 4, 4)),
        "p3": plan_of([mask, 1 - mask]).bind((1, 3, 3)),
        "blend": plan_of([mask, 1 - mask], combine="blend").bind((1, 4, 4)),
    }
    with pytest.raises(error, match=message):
        BoundPlan.batch([known.get(p, p) for p in plans], index)


# From a materialised bias


def template(bound):
    """The seed node pack's form: [1, 1, Nq, Nk], columns equal within a segment."""
    rows = rows_of(bound)
    end = max(e for _, e, _ in bound.segments)
    bias = torch.full((1, 1, bound.queries, end), -INF)
    for row, (s, e, _) in zip(rows, bound.segments, strict=True):
        bias[0, 0, :, s:e] = row[:, None]
    return bias


@pytest.mark.parametrize("options", [dict(), dict(mode="hard"), dict(mode="hard", hard_value=-80)])
@pytest.mark.parametrize("given_ranges", [True, False])
def test_from_bias_recovers_the_plan(options, given_ranges):
    bound = plan_of([torch.rand(4, 4), torch.rand(4, 4)], base_range=(7, 9), **options).bind((1, 4, 4))
    ranges = [(0, 3), (3, 7), (7, 9)] if given_ranges else None
    found = RegionPlan.from_bias(template(bound), ranges, grid=(1, 4, 4))
    assert found.grid == (1, 4, 4)
    assert torch.equal(template(found), template(bound))


def test_from_bias_keeps_columns_that_no_range_names():
    bias = torch.tensor([[0.0, 0.0, -1.0, 0.5, -INF], [0.0, 0.0, -2.0, 0.5, -INF]])
    found = RegionPlan.from_bias(bias, [(2, 3)])
    assert sorted(found.segments) == [(0, 2, 0), (2, 3, 0), (3, 4, 0)]
    assert torch.equal(template(found)[0, 0], bias[:, :4])


def test_from_bias_gives_the_same_attention_as_the_template():
    bound = plan_of([torch.rand(4, 4), torch.rand(4, 4)], strength=0.35).bind((1, 4, 4))
    q, k, v = (torch.randn(2, 3, n, 16) for n in (16, 7, 7))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=template(bound))
    out = anima_fast.regional_attention(q, k, v, RegionPlan.from_bias(template(bound), grid=(1, 4, 4)))
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize(
    ("bias", "ranges", "error", "message"),
    [
        (
            torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, -1.0]]), [(0, 3)], ValueError,
            r"template, segment \[0, 3\), query 1: got 0 at column 1 but -1 at column 2; allowed: one value a query",
        ),
        (torch.tensor([[0.0, math.nan]]), None, ValueError, "template: got nan at query 0, column 1; allowed: finite"),
        (torch.tensor([[0.0, INF]]), None, ValueError, "got inf at query 0, column 1"),
        (torch.full((2, 2), -INF), None, ValueError, "template: got no column that any query may attend to"),
        (torch.zeros(1, 2, 3, 4), None, ValueError, r"template: got torch.float32 of shape \[1, 2, 3, 4\]"),
        (torch.zeros(2, 0), None, ValueError, "template: got"),
        (torch.zeros(2, 3).int(), None, ValueError, "template: got torch.int32"),
        ("bias", None, TypeError, "template: got str"),
        (torch.zeros(2, 3), [(0, 4)], ValueError, "ranges: got .* within the 3 columns"),
        (torch.zeros(2, 3), [(0, 2), (1, 3)], ValueError, r"ranges\[1\]: got \[1, 3\), which overlaps ranges\[0\]"),
    ],
)  # fmt: skip
def test_from_bias_refuses_other_forms(bias, ranges, error, message):
    with pytest.raises(error, match=message):
        RegionPlan.from_bias(bias, ranges)


# Files


@given(region_plans(30))
def test_saved_plans_come_back(tmp_path_factory, plan_and_text):
    plan, text = plan_and_text
    path = tmp_path_factory.mktemp("plan") / "plan.safetensors"
    for one in (plan, plan.crop((0.25, 0, 1, 0.5))):
        one.save(path)
        again = RegionPlan.load(path)
        assert repr(again) == repr(one), text
        first, second = one.bind((1, 5, 7)), again.bind((1, 5, 7))
        assert torch.equal(first.tensors.bias, second.tensors.bias) and first.segments == second.segments
    first.save(path)
    again = BoundPlan.load(path)
    assert again.combine == first.combine and again.tensors[4:] == first.tensors[4:], text
    for x, y in zip(again.tensors[:4], first.tensors[:4], strict=True):
        torch.testing.assert_close(x, y, atol=1e-7, rtol=1e-6)


def test_a_saved_batch_comes_back(tmp_path):
    plain = RegionPlan.plain(4, pad_count=9).bind((1, 4, 4))
    batch = BoundPlan.batch([plain, plan_of(mode="hard").bind((1, 4, 4))], [0, 1, 0])
    batch.save(tmp_path / "batch.safetensors")
    again = BoundPlan.load(tmp_path / "batch.safetensors")
    assert again.tensors[4:] == batch.tensors[4:]
    assert all(torch.equal(x, y) for x, y in zip(again.tensors[:4], batch.tensors[:4], strict=True))


def test_files_that_are_not_plans(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "plan.safetensors"
    with pytest.raises(FileNotFoundError, match="path: no file"):
        RegionPlan.load(path)
    with pytest.raises(FileNotFoundError, match="the directory .* does not exist"):
        plan_of().save(tmp_path / "no" / "plan.safetensors")
    plan_of().save(path)
    whole = path.read_bytes()
    with pytest.raises(ValueError, match="of format 'anima_fast.RegionPlan'; allowed: a saved BoundPlan"):
        BoundPlan.load(path)
    for cut in (0, 7, 100, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match="which cannot be read .*allowed: a whole safetensors file"):
            RegionPlan.load(path)
    tensors = {"mask.0": torch.ones(2, 2)}
    good = {"format": "anima_fast.RegionPlan", "version": "1"}
    fields = dict(token_ranges=[[0, 1]], window=[0, 0, 1, 1])
    for metadata, message in [
        (None, "of format None"),
        ({"format": "pt"}, "of format 'pt'"),
        (good | {"version": "2"}, "path: got version '2'; allowed: version 1"),
        (good | {"plan": "{"}, "which cannot be read"),
        (good | {"plan": "[]"}, "whose metadata is not an object"),
        (good | {"plan": "{}"}, "whose content does not fit"),
        (good | {"plan": json.dumps(fields | {"mode": "odd"})}, "mode: got 'odd'"),
        (good | {"plan": json.dumps(fields | {"surprise": 1})}, "whose content does not fit"),
        (good | {"plan": json.dumps(fields | {"window": [0, 0, 2, 1]})}, "tile: got"),
    ]:
        save_file(tensors, path, metadata)
        with pytest.raises(ValueError, match=message):
            RegionPlan.load(path)
    save_file({"mask.0": torch.full((2, 2), math.nan)}, path, good | {"plan": json.dumps(fields)})
    with pytest.raises(ValueError, match=r"masks\[0\]: got 4 NaN"):
        RegionPlan.load(path)


def test_a_failed_save_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "plan.safetensors"
    plan_of().save(path)
    before = path.read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        plan_of(mode="hard").save(path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == [path.name]


# Bad input


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(masks=torch.ones(2, 4)), ValueError, r"masks\[0\]: got shape \[4\]"),
        (dict(masks="mask.png"), TypeError, "masks: got str; allowed: a sequence of masks"),
        (
            dict(masks=[torch.ones(2, 2)]),
            ValueError,
            "token_ranges: got 2 ranges for 1 masks; allowed: one range a mask",
        ),
        (dict(masks=[], ranges=[]), ValueError, "masks: got no region and no base prompt"),
        (
            dict(ranges=[(0, 3), (2, 5)]),
            ValueError,
            r"token_ranges\[1\]: got \[2, 5\), which overlaps token_ranges\[0\]",
        ),
        (
            dict(ranges=[(0, 3), (5, 4)]),
            ValueError,
            r"token_ranges\[1\]: got \(5, 4\); allowed: 0 <= start <= end",
        ),
        (dict(ranges=[(-1, 3), (5, 6)]), ValueError, r"token_ranges\[0\]: got \(-1, 3\)"),
        (dict(ranges=[(0, 3), (5, 6.5)]), ValueError, "token_ranges: got .*pairs of whole numbers"),
        (dict(ranges=[3, 4]), ValueError, "token_ranges: got"),
        (
            dict(ranges=[(0, 0), (4, 4)]),
            ValueError,
            "no tokens and no pads in any segment; allowed: a context that is",
        ),
        (
            dict(base_range=(2, 9)),
            ValueError,
            r"base_range: got \[2, 9\), which overlaps|overlaps base_range",
        ),
        (dict(base_range=(9, 7)), ValueError, r"base_range: got \(9, 7\)"),
        (dict(base_pad_count=3), ValueError, "base_pad_count: got 3 without a base_range"),
        (
            dict(base_range=(7, 9), base_pad_count=-1),
            ValueError,
            "base_pad_count: got -1; allowed: a whole number >= 0",
        ),
        (dict(pad_counts=[-1, 0]), ValueError, r"pad_counts\[0\]: got -1; allowed: a whole number >= 0"),
        (dict(pad_counts=[0, 1.5]), ValueError, r"pad_counts\[1\]: got 1.5"),
        (dict(pad_counts=[0]), ValueError, "pad_counts: got 1 values for 2 regions; allowed: one a region"),
        (dict(pad_counts=5), TypeError, "pad_counts: got int; allowed: a sequence"),
        (dict(eps=0), ValueError, "eps: got 0; allowed: 0 < eps <= 1"),
        (dict(eps=1.1), ValueError, "eps: got 1.1"),
        (dict(eps="small"), TypeError, "eps: got str"),
        (dict(strength=-1), ValueError, "strength: got -1; allowed: a finite number >= 0"),
        (dict(strength=math.nan), ValueError, "strength: got nan"),
        (dict(region_strengths=[1, INF]), ValueError, r"region_strengths\[1\]: got inf"),
        (dict(priorities=[1, math.nan]), ValueError, r"priorities\[1\]: got nan"),
        (dict(mode="soft"), ValueError, "mode: got 'soft'; allowed: 'soft_log' | 'hard'"),
        (dict(hard_value=-80), ValueError, "hard_value: got -80 with mode='soft_log'"),
        (dict(mode="hard", hard_value=5), ValueError, "hard_value: got 5; allowed: a finite number <= 0"),
        (dict(mode="hard", hard_value=-INF), ValueError, "hard_value: got -inf"),
        (dict(combine="mix"), ValueError, "combine: got 'mix'; allowed: 'logit' | 'blend'"),
        (
            dict(resample="bicubic"),
            ValueError,
            "resample: got 'bicubic'; allowed: 'area' | 'bilinear' | 'nearest'",
        ),
        (dict(pads="keep"), ValueError, "pads: got 'keep'; allowed: 'fold' | 'strip'"),
        (dict(base_weight=-0.1), ValueError, "base_weight: got -0.1"),
    ],
)
def test_bad_parameters_name_the_argument(options, error, message):
    with pytest.raises(error, match=message.replace(" | ", r" \| ") if "allowed: '" in message else message):
        plan_of(**options)


@pytest.mark.parametrize("grid", [(1, 0, 4), (4, 4), (1, 4, 4.5), (1, 2**16, 2**16), 16])
def test_bad_grids(grid):
    with pytest.raises(ValueError, match="grid: got .*allowed: .T, Ht, Wt., whole numbers >= 1"):
        plan_of().bind(grid)


@pytest.mark.parametrize("canvas", [(0, 4), (4.5, 4), (4,), (math.nan, 4)])
def test_bad_canvases(canvas):
    with pytest.raises(ValueError, match="canvas: got .*0 < rows <= 4"):
        plan_of().bind((1, 4, 4), canvas)


@pytest.mark.parametrize("tile", [(0, 0, 0, 1), (0, 0, 1), (0.5, 0, 0.2, 1), (0, 0, 1, 1.2)])
def test_bad_tiles(tile):
    with pytest.raises(ValueError, match="tile: got"):
        plan_of().crop(tile)
