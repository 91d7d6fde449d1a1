"""Doctor's tests on a diffusers pipeline: of random weights, and of one whose pictures are planted."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers", "0.42", reason="needs diffusers >= 0.42: pip install 'anima-fast[diffusers]'")
pytest.importorskip("transformers", reason="needs transformers: pip install 'anima-fast[diffusers]'")

import tiny_pipeline
from fake_comfyui import OBJECT_INFO, noise, picture
from test_doctor_live import workflow

from anima_fast.doctor import live, pipeline
from anima_fast.doctor.ablations import Official
from anima_fast.doctor.case import Case
from anima_fast.doctor.verdict import TESTS
from anima_fast.doctor.workflow import read
from anima_fast.runner.model import quiet

TINY_ANIMA = Path(__file__).parents[1] / "examples" / "tiny_anima"
SMALL = Official(size=(128, 128), steps=2, text="a red house", negative="")


@pytest.fixture(scope="module")
def pipe():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with quiet():
        yield tiny_pipeline.build()
    torch.set_num_threads(threads)


def case_of(tmp_path, prompt):
    import json

    path = tmp_path / "workflow.json"
    path.write_text(json.dumps(prompt))
    return Case(read(path, OBJECT_INFO))


def seeds(size=128, **changed):
    """The seed's workflow, small, with masks that can be computed."""
    prompt = workflow(size=(size, size), steps=3, **changed)
    prompt["7"]["inputs"] |= {"width": size // 2, "height": size}
    for name, x in (("8", 0), ("9", size // 2)):
        black = {"class_type": "SolidMask", "inputs": {"value": 0.0, "width": size, "height": size}}
        prompt[f"black {name}"] = black
        inputs = {"destination": [f"black {name}", 0], "source": ["7", 0], "x": x, "y": 0, "operation": "add"}
        prompt[name] = {"class_type": "MaskComposite", "inputs": inputs}
    prompt["12"]["inputs"] |= {"mask_1": ["8", 0], "mask_2": ["9", 0], "normalize_overlaps": True}
    prompt["13"]["inputs"] |= {"mode": "soft_log", "eps": 0.001, "hard_value": -80.0}
    prompt["14"]["inputs"] |= {"start_percent": 0.2, "end_percent": 1.0}
    return prompt


def test_a_workflow_becomes_a_request(tmp_path):
    prompt = seeds(patched=True, shift=5.0, sampler="er_sde")
    request, notes = pipeline.request_of(case_of(tmp_path, prompt), "DIR")
    request.check()
    assert request.prompt == "studio lighting" and request.negative == "blurry"
    assert [region.prompt for region in request.regions] == ["red sports car", "blue owl"]
    assert (request.size, request.steps, request.guidance, request.seed) == ((128, 128), 3, 4.5, 1)
    assert (request.shift, request.start, request.end) == (5.0, 0.2, 1.0)
    assert request.plan["mode"] == "soft_log" and request.plan["eps"] == 0.001 and request.plan["strength"] == 0.35
    assert any("er_sde" in note for note in notes)
    left = request.regions[0].mask.image("--region")
    assert left.size == (128, 128) and left.getpixel((0, 0)) == 255 and left.getpixel((127, 0)) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.pop("15"), "no sampler"),
        (lambda p: p["4"]["inputs"].update(text=["99", 0]), "region_1 that is no text"),
        (lambda p: p["12"]["inputs"].update(mask_1=["50", 0]), "a mask of region_1 that is made when it runs"),
    ],
)
def test_what_cannot_be_read_off_a_workflow(tmp_path, change, message):
    prompt = seeds()
    prompt["50"] = {"class_type": "LoadImage", "inputs": {"image": "nowhere.png"}}
    prompt["99"] = {"class_type": "LoadImage", "inputs": {"image": "nowhere.png"}}
    change(prompt)
    with pytest.raises(ValueError, match=message):
        pipeline.request_of(case_of(tmp_path, prompt), "DIR")


def test_all_tests_of_random_weights(pipe, tmp_path):
    request, _ = pipeline.request_of(case_of(tmp_path, seeds(patched=True, shift=1.0)), "DIR")
    before = [block.attn2.processor for block in pipe.transformer.transformer_blocks]
    told = []
    run = pipeline.run(pipe, request, official=SMALL, everything=True, tell=lambda *args: told.append(args[0]))
    rows = {row.test: row for row in run.rows}
    assert list(rows) == list(TESTS) and set(told) == set(TESTS)
    assert not [row for row in run.rows if row.status == "failed"]
    assert run.verdict.fault in ("model_stack", "undecided"), "random weights make no pictures"
    assert run.verdict.fault != "none"
    assert rows["regions_off"].difference > 0
    assert rows["attention_off"].difference < 0.02, "another attention, the same picture"
    assert rows["sampling"].changes == ("regions: left out", "shift: 1 -> 3")
    assert rows["resolution"].same_as == "regions_off"
    assert any("regions" in line for line in rows["shapes"].log)
    assert run.environment["facts"]["scheduler"].startswith("FlowMatchEuler")
    after = [block.attn2.processor for block in pipe.transformer.transformer_blocks]
    assert all(a is b for a, b in zip(after, before, strict=True)), "as it was"


def test_a_sampling_patch_made_for_another_model(pipe, tmp_path):
    """ModelSamplingSD3 tells the model a thousand times the noise level."""
    prompt = seeds(patched=True)
    prompt["20"]["class_type"] = "ModelSamplingSD3"
    request, _ = pipeline.request_of(case_of(tmp_path, prompt), "DIR")
    assert request.multiplier == 1000
    seen, current = {}, []
    hook = pipe.transformer.time_embed.register_forward_pre_hook(
        lambda _, args: seen.setdefault(current[-1], []).append(float(args[1].max()))
    )
    run = pipeline.run(pipe, request, official=SMALL, everything=True, tell=lambda test, *_: current.append(test))
    hook.remove()
    assert max(seen["workflow"]) == max(seen["regions_off"]) == 1000
    assert max(seen["baseline"]) == max(seen["sampling"]) == 1
    row = next(row for row in run.rows if row.test == "sampling")
    assert "the model sees the noise level times: 1000 -> 1" in row.changes


PLANTED = {
    "sampling": lambda r: r.shift != 1.0,
    "sampler": lambda r: r.steps != 3,
    "resolution": lambda r: r.size == SMALL.size,
    "regions": lambda r: not r.regions or r.plan.get("strength") == 0,
    "model_stack": lambda r: False,
    "none": lambda r: True,
}


@pytest.mark.parametrize("fault", PLANTED)
def test_a_planted_fault_is_found(pipe, tmp_path, monkeypatch, fault):
    """Requests are judged by the pictures that a planted `generate` draws for them."""
    from PIL import Image

    def generate(pipe, request):
        import io

        data = picture(size=256) if PLANTED[fault](request) else noise(size=256)
        enabled = type("Enabled", (), {"served": {}, "declined": {}})
        return [Image.open(io.BytesIO(data))], enabled

    monkeypatch.setattr(pipeline, "generate", generate)
    size = 256 if fault == "resolution" else 128
    case = case_of(tmp_path, seeds(size, patched=True, shift=1.0))
    request, _ = pipeline.request_of(case, "DIR")
    run = pipeline.run(pipe, request, official=SMALL)
    assert run.verdict.fault == fault, run.verdict
    assert isinstance(run, live.Run)


@pytest.mark.skipif(not (TINY_ANIMA / "model").is_dir(), reason="the tiny Anima is not there")
def test_the_seeds_failure(monkeypatch):
    """A sampling patch made for another model, with regions on: noise with two halves, named from the pictures."""
    pytest.importorskip("accelerate")
    from anima_fast.runner.model import find, load

    case = Case(read(TINY_ANIMA / "wrong_sampling.json", OBJECT_INFO))
    request, _ = pipeline.request_of(case, str(TINY_ANIMA / "model"))
    official = Official(size=(192, 192), steps=12, text="a red circle on a gray background", negative="")
    request = dataclasses.replace(request, steps=12)
    with quiet():
        pipe = load(find(request.model), dtype=torch.float32, device="cpu")
        run = pipeline.run(pipe, request, official=official)
    rows = {row.test: row for row in run.rows}
    assert run.verdict.fault == "sampling", run.verdict
    assert rows["workflow"].kind == "noise" and rows["workflow"].measures.halves_differ
    assert rows["baseline"].kind == rows["sampling"].kind == "picture"


def test_nan_is_blank(pipe, tmp_path, monkeypatch):
    def generate(pipe, request):
        raise FloatingPointError("the model gave NaN in fp16")

    monkeypatch.setattr(pipeline, "generate", generate)
    request, _ = pipeline.request_of(case_of(tmp_path, seeds()), "DIR")
    run = pipeline.run(pipe, request, official=SMALL)
    assert {row.kind for row in run.rows if row.status == "measured"} == {"blank"}
    assert run.verdict.fault == "model_stack"


def test_interrupted(pipe, tmp_path, monkeypatch):
    def generate(pipe, request):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "generate", generate)
    request, _ = pipeline.request_of(case_of(tmp_path, seeds()), "DIR")
    run = pipeline.run(pipe, dataclasses.replace(request, batch=3), official=SMALL)
    assert run.interrupted and run.rows == []
