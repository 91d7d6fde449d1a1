"""Alignment and calibration: the formulas, honest figures, real embeddings, files, and what is refused."""

from __future__ import annotations

import json
import math
import pickle
import re
import warnings

import pytest
import real_embeddings
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from anima_fast.encoder.adjust import Adjustment
from anima_fast.encoder.alignment import Alignment, AlignmentFit, evaluate, procrustes
from anima_fast.encoder.calibration import Calibration, CalibrationFit, Moments
from anima_fast.encoder.files import Origin

pytestmark = pytest.mark.usefixtures("one_thread")


def orthogonal(width, seed=0, determinant=None):
    torch.manual_seed(seed)
    q = torch.linalg.qr(torch.randn(width, width, dtype=torch.float64))[0]
    if determinant is not None and torch.linalg.det(q) * determinant < 0:
        q[0] *= -1
    return q


def planted(width=48, prompts=600, determinant=1, noise=0.0, mean=8.0, seed=0):
    """A source of uneven spread, and R x with another mean: as the two encoders, a mean far larger than the spread."""
    rotation = orthogonal(width, seed, determinant)
    source = torch.randn(prompts, width, dtype=torch.float64) * torch.logspace(0, -2, width).double()
    target = source @ rotation.T + mean * torch.randn(width).double()
    target = target + noise * torch.randn(prompts, width).double()
    return source.float() + 0.3, target.float(), rotation


# ---------------------------------------------------------------------------------------------------- alignment


@pytest.mark.parametrize("determinant", [1, -1], ids=["rotation", "reflection"])
def test_a_planted_rotation_is_found(determinant):
    source, target, rotation = planted(determinant=determinant)
    found = Alignment.fit(source, target)
    assert (found.rotation - rotation).abs().max() < 1e-5
    assert found.determinant == determinant == found.report["determinant"]
    torch.testing.assert_close(found.apply(source, 1.0), target, atol=1e-5, rtol=1e-5)
    report = found.report
    assert report["fitted"] + report["held_out"] == len(source) == report["prompts"]
    assert report["r2"] > 1 - 1e-8 and report["r2_fitted"] > 1 - 1e-8 and abs(report["best_scale"] - 1) < 1e-6
    assert report["after"]["min"] > 1 - 1e-9 and report["centred_after"]["min"] > 1 - 1e-8


def test_without_reflections_it_is_the_best_proper_rotation():
    source, target, _ = planted(width=6, determinant=-1, noise=0.05)
    free, proper = (Alignment.fit(source, target, reflections=allowed) for allowed in (True, False))
    assert (free.determinant, proper.determinant) == (-1, 1)
    x, y = (t.double() - t.double().mean(dim=0) for t in (source, target))

    def trace(rotation):
        return float(((x @ rotation.double().T) * y).sum())

    assert trace(free.rotation) > trace(proper.rotation)
    for seed in range(50):  # no other proper rotation nearby or far does better
        tilt = torch.linalg.matrix_exp(0.1 * (lambda a: a - a.T)(torch.randn(6, 6).double()))
        assert trace(proper.rotation) >= trace(tilt @ proper.rotation.double()) - 1e-3
        assert trace(proper.rotation) >= trace(orthogonal(6, seed, 1)) - 1e-3
    assert proper.report["r2_fitted"] < free.report["r2_fitted"]


@given(width=st.integers(1, 20), prompts=st.integers(4, 60), reflections=st.booleans(), seed=st.integers(0, 99))
def test_it_is_orthogonal_and_optimal_whatever_comes(width, prompts, reflections, seed):
    torch.manual_seed(seed)
    source, target = torch.randn(prompts, width), torch.randn(prompts, width) + 5
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        found = Alignment.fit(source, target, reflections=reflections, held_out=0)
    torch.testing.assert_close(found.rotation @ found.rotation.T, torch.eye(width), atol=1e-5, rtol=0)
    assert reflections or found.determinant == 1
    x, y = source - source.mean(dim=0), target - target.mean(dim=0)
    error = (y - x @ found.rotation.T).double().square().sum()
    other = (y - x @ orthogonal(width, seed + 1, None if reflections else 1).T.float()).double().square().sum()
    assert error <= other * (1 + 1e-5)
    assert found.report["r2_fitted"] == pytest.approx(1 - float(error / y.double().square().sum()), abs=1e-4)


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0, 0.3])
def test_strengths_match_the_formula(strength):
    source, target, _ = planted(noise=0.1)
    found = Alignment.fit(source, target)
    rotation, ms, mt = (t.double() for t in (found.rotation, found.source_mean, found.target_mean))
    x = torch.randn(2, 7, 48, dtype=torch.float64)
    expected = torch.einsum("ij,...j->...i", rotation, x - ms) + (1 - strength) * ms + strength * mt
    torch.testing.assert_close(found.apply(x, strength), expected, atol=1e-6, rtol=1e-6)
    for dtype, eps in ((torch.float32, 1e-5), (torch.bfloat16, 0.1), (torch.float16, 0.02)):
        out = found.apply(x.to(dtype), strength)
        assert out.dtype == dtype
        torch.testing.assert_close(out.double(), expected, atol=eps, rtol=eps)
    centre = found.apply(found.source_mean, strength)  # strength moves the mean and nothing else
    torch.testing.assert_close(centre.double(), ms.lerp(mt, strength), atol=1e-5, rtol=1e-5)
    distances = torch.cdist(found.apply(x, strength)[0], found.apply(x, strength)[0])
    torch.testing.assert_close(distances, torch.cdist(x[0], x[0]), atol=1e-5, rtol=1e-5)


def test_batches_give_what_one_call_gives():
    source, target, _ = planted(noise=0.3, mean=1000.0)  # sums of squares would lose what the mean hides
    categories = [("pose", "character", "meta")[i % 7 % 3] for i in range(len(source))]
    whole = Alignment.fit(source, target, categories=categories)
    fit = AlignmentFit(48)
    for start in (0, 1, 4, 104, 590):
        end = {0: 1, 1: 4, 4: 104, 104: 590, 590: 600}[start]
        fit.add(source[start:end], target[start:end], categories[start:end])
    fit.add(source[:0], target[:0])
    parts = fit.finish()
    torch.testing.assert_close(parts.rotation, whole.rotation, atol=1e-6, rtol=0)
    assert parts.report["held_out"] == whole.report["held_out"] == 60
    assert set(whole.report["categories"]) == {"pose", "character", "meta"}
    assert sum(c["held_out"] for c in whole.report["categories"].values()) == 60
    assert parts.report["r2"] == pytest.approx(whole.report["r2"], abs=1e-9)
    exact = Alignment.fit(source - source.mean(dim=0), target - target.mean(dim=0), held_out=0)
    again = Alignment.fit(source, target, held_out=0)
    torch.testing.assert_close(again.rotation, exact.rotation, atol=2e-4, rtol=0)  # fp32 of the shifted input


def test_held_out_prompts_are_not_fitted():
    source, target, _ = planted(noise=0.1)
    fit = AlignmentFit(48)
    fit.add(source, target)
    rows = [next(i for i in range(600) if torch.equal(source[i], held[0])) for held in fit.held]
    assert rows == list(range(5, 600, 10))
    spoiled = source.clone()
    spoiled[rows] = 100.0
    torch.testing.assert_close(
        Alignment.fit(spoiled, target).rotation, Alignment.fit(source, target).rotation, atol=0, rtol=0
    )


def test_the_shared_mean_flatters_the_cosine():
    """Two unrelated spaces with one large mean: cosines as good as the published ones, and no alignment at all."""
    torch.manual_seed(0)
    source = 0.33 * torch.randn(3000, 32) + 0.1
    target = torch.randn(3000, 32) + 4
    report = Alignment.fit(source, target).report
    assert report["before"]["mean"] < 0.35 and report["after"]["mean"] > 0.95
    assert report["of_mean"]["mean"] >= report["after"]["mean"] - 0.02  # the mean alone does as well
    assert abs(report["centred_after"]["mean"]) < 0.1 and report["r2"] < 0.05


def test_r2_knows_that_a_rotation_does_not_stretch():
    source, target, rotation = planted()
    small = source / 10
    found = Alignment.fit(small, target)
    assert (found.rotation - rotation).abs().max() < 1e-4  # right directions
    report = found.report
    assert report["centred_after"]["mean"] > 1 - 1e-6 and report["r2"] == pytest.approx(0.19, abs=0.01)
    assert report["r2_scaled"] > 1 - 1e-6 and report["best_scale"] == pytest.approx(10, rel=1e-5)


def test_what_prompts_do_not_determine_is_left_alone():
    source, target, rotation = planted(width=48, prompts=12)
    with pytest.warns(UserWarning, match=re.escape("12 prompts determine 11 of 48 directions")):
        found = Alignment.fit(source, target, held_out=0)
    assert found.report["rank"] == 11
    x = source.double() - source.double().mean(dim=0)
    torch.testing.assert_close(x @ found.rotation.double().T, x @ rotation.T, atol=1e-5, rtol=0)
    cross = torch.zeros(5, 5, dtype=torch.float64)
    cross[0, 0] = 2.0
    rotation, trace, rank = procrustes(cross)
    assert rank == 1 and trace == 2 and torch.allclose(rotation, torch.eye(5, dtype=torch.float64))
    rotation, _, _ = procrustes(-cross, reflections=False)
    assert torch.linalg.det(rotation) > 0 and rotation[0, 0] == -1


def test_evaluate_by_hand():
    alignment = Alignment(torch.eye(2), torch.zeros(2), torch.tensor([3.0, 4.0]))
    source, target = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[4.0, 4.0], [3.0, 3.0]])
    found = evaluate(alignment, source, target, ["a", "b"], scale=2.0)
    assert found["before"]["mean"] == pytest.approx((4 / math.sqrt(32) + 3 / math.sqrt(18)) / 2)
    assert found["after"]["min"] == pytest.approx((3 * 3 + 5 * 3) / (math.sqrt(34) * math.sqrt(18)))
    assert found["of_mean"]["min"] == pytest.approx((3 * 4 + 4 * 4) / (5 * math.sqrt(32)))
    assert found["centred_after"] == {"mean": pytest.approx(0.0), "min": pytest.approx(-1.0)}
    spread = 0.5 + 0.5  # around (3.5, 3.5)
    assert found["r2"] == pytest.approx(1 - (0 + 4) / spread)
    assert found["r2_scaled"] == pytest.approx(1 - (1 + 9) / spread)
    assert found["categories"]["a"]["centred_after"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(source=torch.zeros(3)), "source: got Tensor"),
        (dict(target=torch.zeros(9, 4)), "target: got shape [9, 4]; allowed: [10, 4]"),
        (dict(target=torch.zeros(10, 5)), "target: got shape [10, 5]; allowed: [10, 4]"),
        (dict(source=torch.ones(10, 4)), "source: got the same vector for every prompt"),
        (dict(categories=["a"]), "categories: got 1 for 10 prompts"),
        (dict(held_out=0.9), "held_out: got 0.9"),
        (dict(held_out=math.nan), "held_out: got nan"),
        (dict(source=torch.randn(1, 4), target=torch.randn(1, 4)), "source: got 1 prompts to fit"),
        (dict(source=torch.full((10, 4), math.nan)), "source: got values that are not finite in row 0"),
    ],
)
def test_what_a_fit_refuses(arguments, message):
    given = dict(source=torch.randn(10, 4), target=torch.randn(10, 4)) | arguments
    with pytest.raises((ValueError, TypeError), match=re.escape(message)):
        Alignment.fit(given.pop("source"), given.pop("target"), **given)


def test_what_apply_refuses():
    found = Alignment.fit(*planted()[:2])
    for strength in (-0.1, 1.1, math.nan, "half"):
        with pytest.raises(ValueError, match="alignment_strength"):
            found.apply(torch.zeros(1, 48), strength)
    with pytest.raises(ValueError, match="x: got 47 dimensions; allowed: 48"):
        found.apply(torch.zeros(1, 47))


# -------------------------------------------------------------------------------------------------- calibration


def tokens(width=48, seed=3):
    torch.manual_seed(seed)
    spread = torch.logspace(-1, 0.5, width)
    return torch.randn(3000, width) * 0.3 + 0.02, torch.randn(2000, width) * spread + 2 * torch.randn(width)


def test_calibration_gives_the_target_mean_and_spread():
    source, target = tokens()
    found = Calibration.fit(source, target)
    scale = target.double().std(dim=0, correction=0) / source.double().std(dim=0, correction=0)
    torch.testing.assert_close(found.scale.double(), scale, atol=1e-5, rtol=1e-5)
    bias = target.double().mean(dim=0) - scale * source.double().mean(dim=0)
    torch.testing.assert_close(found.bias.double(), bias, atol=1e-5, rtol=1e-5)
    out = found.apply(source.view(30, 100, 48))
    torch.testing.assert_close(out.flatten(0, 1).mean(dim=0), target.mean(dim=0), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(out.flatten(0, 1).std(dim=0), target.std(dim=0), atol=1e-3, rtol=1e-3)
    assert found.report["scale"]["max"] == pytest.approx(float(scale.max()), rel=1e-5)


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_calibration_after_an_alignment_is_fitted_after_it(strength):
    source, target = tokens()
    alignment = Alignment.fit(source[:600], target[:600])
    found = Calibration.fit(source, target, alignment=alignment)
    out = found.apply(alignment.apply(source, strength), alignment, strength)
    torch.testing.assert_close(out.mean(dim=0), target.mean(dim=0), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(out.std(dim=0), target.std(dim=0), atol=1e-3, rtol=1e-3)
    plain = Calibration.fit(source, target)
    torch.testing.assert_close(found.scale, plain.scale)  # what the file has under the published names
    with pytest.warns(UserWarning, match="may over-correct"):
        wrong = plain.apply(alignment.apply(source, strength), alignment, strength)
    off = (wrong.mean(dim=0) - target.mean(dim=0)).abs().max()
    if strength:  # the shift of the alignment, scaled and added to that of the calibration
        assert off > 0.5


def test_a_calibration_belongs_to_its_alignment():
    source, target = tokens()
    mine, other = (Alignment.fit(source[s], target[s]) for s in (slice(0, 600), slice(600, 1200)))
    found = Calibration.fit(source, target, alignment=mine)
    with pytest.raises(ValueError, match="calibration: got statistics fitted after another alignment"):
        found.apply(source, other, 0.5)
    with pytest.warns(UserWarning, match="after another alignment"):
        found.apply(source, other, 0.5, force=True)


def test_constant_dimensions_are_not_blown_up():
    source, target = tokens()
    source[:, 7] = 0.25
    source[:, 9] = 0.5 + 1e-6 * torch.randn(3000)
    with pytest.warns(UserWarning, match="2 of 48 dimensions"):
        found = Calibration.fit(source, target)
    assert found.scale[7] == found.scale[9] == 1 and found.report["constant_dimensions"] == 2
    assert torch.isfinite(found.scale).all() and found.scale.max() < 100
    torch.testing.assert_close(found.apply(source)[:, 7], target[:, 7].mean().expand(3000), atol=1e-4, rtol=1e-4)


@given(cuts=st.lists(st.integers(0, 200), max_size=5), offset=st.sampled_from([0.0, 1e3, -1e5]))
def test_moments_in_batches(cuts, offset):
    torch.manual_seed(1)
    x = torch.randn(200, 5, dtype=torch.float64) + offset
    moments = Moments(5)
    for start, end in zip([0, *sorted(cuts)], [*sorted(cuts), 200], strict=True):
        moments.add(x[start:end])
    assert moments.count == 200
    torch.testing.assert_close(moments.mean, x.mean(dim=0), atol=1e-9, rtol=1e-12)
    torch.testing.assert_close(moments.std, x.std(dim=0, correction=0), atol=1e-8, rtol=1e-8)


def test_what_a_calibration_refuses():
    source, target = tokens()
    with pytest.raises(ValueError, match=re.escape("target: got shape [4, 47]; allowed: [tokens, 48]")):
        Calibration.fit(source, torch.zeros(4, 47))
    with pytest.raises(ValueError, match="target: got 0 tokens; allowed: at least 2"):
        Calibration.fit(source, target[:0])
    with pytest.raises(ValueError, match="source: got the same vector for every token"):
        Calibration.fit(source * 0, target)
    with pytest.raises(ValueError, match="source: got values that are not finite"):
        Calibration.fit(source / 0, target)
    with pytest.raises(ValueError, match="alignment: got 47 dimensions; allowed: 48"):
        CalibrationFit(48, alignment=Alignment.fit(torch.randn(100, 47), torch.randn(100, 47)))
    with pytest.raises(ValueError, match="x: got 47 dimensions; allowed: 48"):
        Calibration.fit(source, target).apply(torch.zeros(47))


# ---------------------------------------------------------------------------------------------------- the order


def test_the_order_is_alignment_calibration_scale():
    source, target = tokens()
    alignment = Alignment.fit(source[:600], target[:600])
    calibration = Calibration.fit(source, target, alignment=alignment)
    x = torch.randn(2, 5, 48)
    aligned = alignment.apply(x, 0.7)
    calibrated = calibration.apply(aligned, alignment, 0.7)
    adjustment = Adjustment(alignment, 0.7, calibration, 2.0)
    torch.testing.assert_close(adjustment(x), calibrated * 2)
    stages = adjustment.stages(x)
    assert list(stages) == ["raw", "aligned", "calibrated", "scaled"]
    for name, expected in (("raw", x), ("aligned", aligned), ("calibrated", calibrated), ("scaled", 2 * calibrated)):
        torch.testing.assert_close(stages[name], expected)
    assert Adjustment()(x) is x and list(Adjustment().stages(x)) == ["raw"]
    torch.testing.assert_close(Adjustment(alignment)(x), alignment.apply(x, 0.5))
    torch.testing.assert_close(Adjustment(calibration=calibration)(x), calibration.apply(x))
    for bad in (math.nan, math.inf, "1"):
        with pytest.raises(ValueError, match="output_scale"):
            Adjustment(output_scale=bad)
    with pytest.raises(ValueError, match="alignment_strength"):
        Adjustment(alignment_strength=2)


# -------------------------------------------------------------------------------------------------------- files

ORIGIN = Origin("gdn", "exp", "0123456789abcdef", "fedcba", 600)
ENCODER = dict(recurrence="gdn", head_norm="exp", encoder_hash="0123456789abcdef")


@pytest.fixture(scope="module")
def pair():
    source, target = tokens()
    alignment = Alignment.fit(source[:600], target[:600], origin=ORIGIN)
    return alignment, Calibration.fit(source, target, alignment=alignment, origin=ORIGIN)


def test_files_come_back_as_they_were(tmp_path, pair):
    alignment, calibration = pair
    alignment.save(tmp_path / "a.safetensors")
    calibration.save(tmp_path / "c.safetensors")
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        assert set(file.keys()) == {"rotation", "mean_4b", "mean_06b"}
        assert file.metadata()["recurrence"] == "gdn" and file.metadata()["prompts"] == "600"
    with safe_open(tmp_path / "c.safetensors", framework="pt") as file:
        assert {"scale", "bias", "mean_4b", "std_4b", "mean_06b", "std_06b"} <= set(file.keys())
    found = Alignment.load(tmp_path / "a.safetensors")
    assert torch.equal(found.rotation, alignment.rotation) and found.origin == ORIGIN
    assert found.report == json.loads(json.dumps(alignment.report))
    again = Calibration.load(tmp_path / "c.safetensors")
    assert again.origin == ORIGIN and torch.equal(again.rotated_std, calibration.rotated_std)
    x = torch.randn(3, 48)
    torch.testing.assert_close(
        Adjustment.read(tmp_path / "a.safetensors", 0.3, tmp_path / "c.safetensors", **ENCODER, width=48)(x),
        Adjustment(alignment, 0.3, calibration)(x),
        atol=0,
        rtol=0,
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "c.safetensors"]  # nothing temporary


def test_published_files_load_with_a_warning(tmp_path):
    torch.manual_seed(0)
    std = {name: torch.rand(16) + 0.5 for name in ("std_4b", "std_06b")}
    mean = {name: torch.randn(16) for name in ("mean_4b", "mean_06b")}
    scale = std["std_06b"] / std["std_4b"]
    bias = mean["mean_06b"] - scale * mean["mean_4b"]
    save_file({"scale": scale, "bias": bias, **mean, **std}, tmp_path / "calibration_params.safetensors")
    save_file({"rotation": orthogonal(16).float().contiguous(), **mean}, tmp_path / "rotation_matrix.safetensors")
    with pytest.warns(UserWarning, match="does not say which recurrence"):
        calibration = Calibration.load(tmp_path / "calibration_params.safetensors")
    x = torch.randn(4, 16)
    torch.testing.assert_close(calibration.apply(x), x * scale + bias)
    with pytest.warns(UserWarning, match="does not say which recurrence"):
        alignment = Alignment.load(tmp_path / "rotation_matrix.safetensors")
    assert alignment.origin == Origin() and calibration.report is None
    with pytest.warns(UserWarning, match="may over-correct"):
        both = Adjustment(alignment, 0.5, calibration)
    torch.testing.assert_close(both(x), alignment.apply(x, 0.5) * scale + bias)  # as the published node


def test_another_recurrence_is_refused_unless_forced(pair):
    alignment, calibration = pair
    other = ENCODER | dict(recurrence="mamba2")
    for part in (dict(alignment=alignment), dict(calibration=calibration)):
        name = next(iter(part))
        with pytest.raises(ValueError, match=f"{name}: got a file fitted to recurrence='gdn', but the encoder runs"):
            Adjustment.read(**part, **other)
        with pytest.warns(UserWarning, match="statistics are of other vectors"):
            Adjustment.read(**part, **other, force=True)
    with pytest.warns(UserWarning, match="fitted to head_norm='exp', used with 'one_plus'"):
        Adjustment.read(alignment, **(ENCODER | dict(head_norm="one_plus")))
    with pytest.warns(UserWarning, match="fitted to encoder weights 0123456789ab, used with other"):
        Adjustment.read(alignment, **(ENCODER | dict(encoder_hash="other")))
    with pytest.raises(ValueError, match="alignment: got 48 dimensions; allowed: 1024"):
        Adjustment.read(alignment, **ENCODER, width=1024)
    with pytest.raises(ValueError, match="calibration: got 48 dimensions; allowed: 1024"):
        Adjustment.read(None, 0.5, calibration, **ENCODER, width=1024)
    Adjustment.read(alignment, 0.5, calibration, **ENCODER, width=48)  # and no warning


def broken_files(folder, good):
    data = good.read_bytes()
    with safe_open(good, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()

    def saved(name, change=None, meta=None):
        save_file({n: t for n, t in (tensors | (change or {})).items() if t is not None}, folder / name, meta)
        return folder / name

    def written(name, content):
        (folder / name).write_bytes(content)
        return folder / name

    rotation = tensors["rotation"]
    with_nan = rotation.clone()
    with_nan[3, 4] = math.nan
    yield written("truncated", data[:-100]), "which cannot be read"
    yield written("header", data[:20]), "which cannot be read"
    yield written("empty", b""), "which cannot be read"
    yield written("pickled", pickle.dumps({"rotation": 1})), "a pickle"
    torch.save({"rotation": rotation}, folder / "pickled.pt")
    yield folder / "pickled.pt", "a pickle"
    yield saved("missing", {"mean_4b": None}, metadata), "without mean_4b; allowed: the tensors rotation, mean_4b"
    yield saved("extra", {"more": torch.zeros(48)}, metadata), "with more besides"
    yield saved("shape", {"mean_4b": torch.zeros(47)}, metadata), "of shape"
    yield saved("square", {"rotation": rotation[:47].clone()}, metadata), "rotation of shape [47, 48]"
    yield saved("scalar", {"mean_4b": torch.tensor(1.0)}, metadata), "of shape"
    yield saved("nan", {"rotation": with_nan}, metadata), "rotation with values that are not finite"
    yield saved("integers", {"mean_4b": torch.zeros(48, dtype=torch.int32)}, metadata), "mean_4b of torch.int32"
    yield saved("bent", {"rotation": rotation * 1.1}, metadata), "whose rotation is not orthogonal"
    yield saved("kind", None, metadata | {"format": "anima_fast.Calibration"}), "of format 'anima_fast.Calibration'"
    yield saved("future", None, metadata | {"version": "2"}), "of version '2'; allowed: version '1'"
    yield saved("recurrence", None, metadata | {"recurrence": "rwkv"}), "recurrence: got 'rwkv'"
    yield saved("prompts", None, metadata | {"prompts": "many"}), "whose metadata does not fit"
    yield saved("report", None, metadata | {"report": "{"}), "whose metadata does not fit"


def test_damaged_and_wrong_files(tmp_path, pair):
    pair[0].save(tmp_path / "good.safetensors")
    count = 0
    for path, message in broken_files(tmp_path, tmp_path / "good.safetensors"):
        with pytest.raises(ValueError, match=re.escape(message)) as caught:
            Alignment.load(path)
        assert str(caught.value).startswith("alignment: got") and str(path) in str(caught.value)
        count += 1
    assert count == 18
    with pytest.raises(FileNotFoundError, match="alignment: no file"):
        Alignment.load(tmp_path / "nowhere.safetensors")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        pair[0].save(tmp_path / "nowhere" / "a.safetensors")
    pair[1].save(tmp_path / "c.safetensors")
    with pytest.raises(ValueError, match="of format 'anima_fast.Calibration'; allowed: a saved Alignment"):
        Alignment.load(tmp_path / "c.safetensors")
    with safe_open(tmp_path / "c.safetensors", framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    save_file(tensors | {"std_4b": -tensors["std_4b"]}, tmp_path / "negative", metadata)
    with pytest.raises(ValueError, match="std_4b with negative values"):
        Calibration.load(tmp_path / "negative")
    del tensors["std_4b_rotated"]
    save_file(tensors, tmp_path / "half", metadata)
    with pytest.raises(ValueError, match="both or none"):
        Calibration.load(tmp_path / "half")


def test_a_failed_save_leaves_the_old_file(tmp_path, pair, monkeypatch):
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"old")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        pair[0].save(path)
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


# ----------------------------------------------------------------------------------------------- real embeddings


@pytest.fixture(scope="module")
def real():
    texts, categories = real_embeddings.prompts(1500)
    tokens = real_embeddings.wordllama(texts)
    return tokens, torch.stack([rows.mean(dim=0) for rows in tokens]), categories


@pytest.mark.parametrize("determinant", [1, -1], ids=["rotation", "reflection"])
def test_a_planted_rotation_of_real_embeddings(real, determinant):
    _, pooled, categories = real
    rotation = orthogonal(256, 4, determinant).float()
    target = pooled @ rotation.T + 5 * pooled.std() * torch.randn(256)
    found = Alignment.fit(pooled, target, categories=categories)
    assert found.report["rank"] == 256
    assert (found.rotation - rotation).abs().max() < 1e-5 and found.determinant == determinant
    torch.testing.assert_close(found.apply(pooled, 1.0), target, atol=1e-5, rtol=1e-5)
    assert set(found.report["categories"]) == set(real_embeddings.WORDS)
    assert min(entry["centred_after"] for entry in found.report["categories"].values()) > 1 - 1e-6


def test_two_halves_of_real_embeddings(real):
    """Different coordinates of one model, trained so that each half says what the whole does: related, not rotated."""
    tokens, pooled, categories = real
    source, target = pooled[:, :128], pooled[:, 128:] + 10 * pooled.std()
    report = Alignment.fit(source, target, categories=categories).report
    print(show(report))
    assert 140 < report["held_out"] < 160 and report["rank"] == 128
    # a shared mean alone gets most of the cosine, so that says little
    assert (
        report["after"]["mean"] > 0.95 and report["of_mean"]["mean"] > 0.9 > abs(report["centred_before"]["mean"]) * 3
    )
    # what was learned carries over to prompts that were not fitted, and is far from all
    assert 0.3 < report["centred_after"]["mean"] < 0.98 and 0.05 < report["r2"] <= report["r2_scaled"] < 0.98
    assert report["r2_fitted"] > report["r2"] - 0.02
    shuffled = target[torch.randperm(len(target), generator=torch.Generator().manual_seed(0))]
    nothing = Alignment.fit(source, shuffled).report  # the same spaces, prompts mixed up
    print(show(nothing))
    assert abs(nothing["centred_after"]["mean"]) < 0.15 and nothing["r2"] < 0.02 and nothing["after"]["mean"] > 0.9
    assert nothing["r2_scaled_fitted"] > 0 > nothing["r2_scaled"] - 0.02  # fitted figures flatter
    alignment = Alignment.fit(source, target)
    x, y = (torch.cat([rows[:, s] for rows in tokens]) for s in (slice(0, 128), slice(128, 256)))
    out = Calibration.fit(x, y, alignment=alignment).apply(alignment.apply(x, 0.5), alignment, 0.5)
    torch.testing.assert_close(out.mean(dim=0), y.mean(dim=0), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(out.std(dim=0), y.std(dim=0), atol=1e-3, rtol=1e-3)


@pytest.mark.slow
def test_two_models(real, tmp_path):
    """Static vectors to the states of a transformer, both real; the target in 256 directions of its 384."""
    _, pooled, categories = real
    texts, _ = real_embeddings.prompts(1500)
    axes = orthogonal(384, 9)[:256].float()
    target = real_embeddings.minilm(texts, tmp_path) @ axes.T
    found = Alignment.fit(pooled, target, categories=categories)
    report = found.report
    print(show(report))
    assert 0.2 < report["centred_after"]["mean"] < 0.95 and abs(report["centred_before"]["mean"]) < 0.1
    assert 0.05 < report["r2_scaled"] < 0.9 and report["r2"] <= report["r2_scaled"] + 1e-6
    half = found.apply(pooled, 0.5)
    torch.testing.assert_close(half, (found.apply(pooled, 0.0) + found.apply(pooled, 1.0)) / 2, atol=1e-5, rtol=1e-5)


def show(report):
    names = ("before", "after", "of_mean", "centred_before", "centred_after")
    cosines = ", ".join(f"{name} {report[name]['mean']:.3f} (min {report[name]['min']:.3f})" for name in names)
    numbers = ("r2", "r2_scaled", "r2_fitted", "r2_scaled_fitted", "best_scale")
    return f"{cosines}; " + ", ".join(f"{name} {report[name]:.3f}" for name in numbers)
