"""Doctor's live side: measures, the verdict on made tables, the tests as prompts, and servers that misbehave."""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib.util
import socket
import threading
import time

import fake_comfyui
import numpy as np
import pytest
from fake_comfyui import OBJECT_INFO, FakeComfyUI, noise, picture

from anima_fast.doctor import live, measure, verdict
from anima_fast.doctor.ablations import END, Official, plan
from anima_fast.doctor.environment import facts
from anima_fast.doctor.verdict import TESTS, Row

needs_client = pytest.mark.skipif(
    importlib.util.find_spec("websocket") is None or importlib.util.find_spec("httpx2") is None,
    reason="needs the extra doctor",
)


def node(kind, **inputs):
    return {"class_type": kind, "inputs": inputs}


def workflow(*, patched=False, steps=40, cfg=4.5, sampler="euler", scheduler="normal", size=(1024, 1024), shift=3.0):
    """The seed's: one pack, two regions; the sampling patch on request."""
    model = ["20", 0] if patched else ["1", 0]
    nodes = {
        "1": node("UNETLoader", unet_name="mine.safetensors", weight_dtype="default"),
        "2": node("EmptyLatentImage", width=size[0], height=size[1], batch_size=1),
        "3": node("CLIPTextEncode", clip=["18", 0], text="studio lighting"),
        "4": node("CLIPTextEncode", clip=["18", 0], text="red sports car"),
        "5": node("CLIPTextEncode", clip=["18", 0], text="blue owl"),
        "6": node("CLIPTextEncode", clip=["18", 0], text="blurry"),
        "7": node("SolidMask", value=1.0, width=512, height=1024),
        "11": node("AnimaRegionalConditioningConcat", region_1=["4", 0], region_2=["5", 0], base=["3", 0]),
        "12": node("AnimaMaskToTokenGrid", model=model, latent=["2", 0], mask_1=["7", 0], mask_2=["7", 0]),
        "13": node("AnimaBuildRegionalCrossAttnBias", ranges=["11", 1], token_weights=["12", 0], strength=0.35),
        "14": node(
            "AnimaApplyRegionalAttentionHook", positive=["11", 0], negative=["6", 0], bias_template=["13", 0],
            model=model, attention_backend="orig", debug_shapes=False,
        ),
        "15": node(
            "KSampler", model=model, positive=["14", 0], negative=["14", 1], latent_image=["2", 0], seed=1, steps=steps,
            cfg=cfg, sampler_name=sampler, scheduler=scheduler, denoise=1.0,
        ),
        "16": node("VAEDecode", samples=["15", 0], vae=["19", 0]),
        "17": node("SaveImage", images=["16", 0], filename_prefix="out"),
        "18": node("CLIPLoader", clip_name="clip.safetensors", type="stable_diffusion"),
        "19": node("VAELoader", vae_name="anima_vae.safetensors"),
    }  # fmt: skip
    if patched:
        nodes["20"] = node("ModelSamplingAuraFlow", model=["1", 0], shift=shift)
    return nodes


def planned(prompt, **options):
    return {a.test: a for a in plan(prompt, OBJECT_INFO, **options)}


# ---- measures


@pytest.mark.parametrize("size", [128, 256, 1024])
@pytest.mark.parametrize("seed", range(3))
def test_pictures_and_noise_are_told_apart(size, seed):
    assert measure.measure(measure.decode(picture(seed, size))).kind == "picture"
    assert measure.measure(measure.decode(noise(seed, size))).kind == "noise"
    fine = np.random.default_rng(seed).normal(0.5, 0.2, (3, size, size))
    assert measure.measure(fine).kind == "noise"


def test_noise_with_two_halves_is_noise_and_its_halves_differ():
    one, two = (measure.measure(measure.decode(noise(0, 512, step))) for step in (0.0, 0.15))
    assert one.kind == two.kind == "noise"
    assert two.halves_differ and not one.halves_differ
    assert two.right[0] - two.left[0] == pytest.approx(0.15, abs=0.02)


def test_flatness_of_white_noise_is_one_and_its_slope_zero():
    found = measure.measure(np.random.default_rng(0).standard_normal((16, 128, 128)), cell=1)
    assert found.flatness == pytest.approx(1, abs=0.05)
    assert found.slope == pytest.approx(0, abs=0.15)


@pytest.mark.parametrize("exponent", [1.5, 2.0, 3.0])
def test_the_slope_is_that_of_the_power_law(exponent):
    size = 512
    f = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.fftfreq(size)[None])
    f[0, 0] = 1
    white = np.random.default_rng(1).standard_normal((8, size, size))
    planes = np.fft.ifft2(np.fft.fft2(white) * f ** (-exponent / 2)).real
    found = measure.measure(planes, cell=1)
    assert found.slope == pytest.approx(-exponent, abs=0.3)
    assert found.kind == "picture"


@pytest.mark.parametrize("value", [0.0, 0.5, float("nan")])
def test_blank(value):
    assert measure.measure(np.full((3, 256, 256), value)).kind == "blank"


def test_a_regular_pattern_is_no_noise():
    y, x = np.mgrid[:256, :256] // 24
    assert measure.measure(np.stack([0.5 + 0.1 * ((x + y) % 2)] * 3)).kind == "unclear"


def test_too_small_to_tell():
    assert measure.measure(measure.decode(picture(size=64))).kind == "unclear"
    assert measure.measure(measure.decode(noise(size=64))).kind == "unclear"


def test_shapes_that_cannot_be_measured():
    with pytest.raises(ValueError, match=r"picture: got shape \[3, 32, 256\]"):
        measure.measure(np.zeros((3, 32, 256)))
    with pytest.raises(ValueError, match="cannot be read"):
        measure.decode(b"no picture")
    with pytest.raises(ValueError, match="cannot be read"):
        measure.latent_array(b"no latent")


def test_a_latent_file():
    torch = pytest.importorskip("torch")
    from safetensors.torch import save

    for shape in ((1, 16, 32, 48), (2, 16, 1, 32, 48)):
        planes = measure.latent_array(save({"latent_tensor": torch.randn(shape)}))
        assert planes.shape == (16, 32, 48)
        assert measure.measure(planes, cell=1).kind == "noise"
        assert measure.decode(measure.latent_picture(planes)).shape == (3, 32, 48)


# ---- the verdict, on tables made for each branch


@functools.cache
def noise_measures():
    return measure.measure(measure.decode(noise(0, 128)))


def table(**kinds):
    """Rows by test: a kind of result, "failed", or "= other" for one that was skipped since it equals another."""
    base = noise_measures()
    rows = []
    for test, kind in kinds.items():
        if kind == "failed":
            rows.append(Row(test, "failed", why="an error"))
        elif kind == "skipped":
            rows.append(Row(test, "skipped", why="nothing to change"))
        elif kind.startswith("= "):
            rows.append(Row(test, "skipped", why="nothing to change", same_as=kind[2:]))
        else:
            slope = {"picture": -2.4, "unclear": -1.8}.get(kind, 0.0)
            rows.append(Row(test, "measured", dataclasses.replace(base, kind=kind, slope=slope)))
    return rows


BAD = dict(workflow="noise", baseline="picture", files="picture", first_pass="= workflow")
OFF = dict(BAD, regions_off="noise")
BRANCHES = {
    "nothing wrong": (dict(workflow="picture"), "none", ()),
    "nothing known": ({}, "undecided", ("workflow", "baseline")),
    "unclear": (dict(workflow="unclear"), "undecided", ("baseline",)),
    "unclear, as is the baseline": (dict(workflow="unclear", baseline="unclear"), "undecided", ()),
    "baseline next": (dict(workflow="noise"), "undecided", ("baseline",)),
    "baseline fails too": (dict(workflow="noise", baseline="noise", files="= baseline"), "model_stack", ()),
    "baseline black": (dict(workflow="blank", baseline="blank", files="= baseline"), "model_stack", ()),
    "baseline does not run": (dict(workflow="noise", baseline="failed", files="= baseline"), "model_stack", ()),
    "baseline unclear": (dict(workflow="noise", baseline="unclear", files="= baseline"), "undecided", ()),
    "baseline fails, own files next": (dict(workflow="noise", baseline="noise"), "undecided", ("files",)),
    "official files broken, own work": (dict(BAD, baseline="noise"), "undecided", ("regions_off",)),
    "own files fail": (dict(BAD, files="noise"), "files", ()),
    "neither": (dict(BAD, baseline="noise", files="noise"), "model_stack", ()),
    "does not run": (dict(BAD, workflow="failed"), "does_not_run", ()),
    "does not run, nor does the baseline": (
        dict(workflow="failed", baseline="failed", files="failed"), "model_stack", ()
    ),
    "second pass": (dict(BAD, first_pass="picture"), "later_pass", ()),
    "first pass next": (dict(workflow="noise", baseline="picture", files="= baseline"), "undecided", ("first_pass",)),
    "regions next": (BAD, "undecided", ("regions_off",)),
    "regions unclear": (dict(BAD, regions_off="unclear"), "undecided", ()),
    "zero strength next": (dict(BAD, regions_off="picture"), "undecided", ("zero_strength",)),
    "token grid": (dict(BAD, regions_off="picture", zero_strength="picture", shapes="noise"), "regions", ()),
    "token grid, shapes next": (dict(BAD, regions_off="picture", zero_strength="picture"), "regions", ("shapes",)),
    "no strength to set": (dict(BAD, regions_off="picture", zero_strength="skipped"), "regional", ()),
    "other attention next": (dict(BAD, regions_off="picture", zero_strength="noise"), "undecided", ("attention_off",)),
    "conflict": (
        dict(BAD, regions_off="picture", zero_strength="noise", attention_off="picture"), "attention_conflict", ()
    ),
    "override": (dict(BAD, regions_off="picture", zero_strength="noise", attention_off="noise"), "override", ()),
    "override, nothing to remove": (
        dict(BAD, regions_off="picture", zero_strength="noise", attention_off="= first_pass"), "override", ()
    ),
    "other attention unclear": (
        dict(BAD, regions_off="picture", zero_strength="noise", attention_off="unclear"), "undecided", ()
    ),
    "singles next": (OFF, "undecided", ("sampling", "sampler", "resolution")),
    "sampling": (dict(OFF, sampling="picture", sampler="noise", resolution="noise"), "sampling", ()),
    "sampler": (dict(OFF, sampling="noise", sampler="picture", resolution="= regions_off"), "sampler", ()),
    "resolution": (dict(OFF, sampling="= regions_off", sampler="noise", resolution="picture"), "resolution", ()),
    "one is missing": (dict(OFF, sampling="picture", sampler="noise"), "undecided", ("resolution",)),
    "all three next": (dict(OFF, sampling="noise", sampler="noise", resolution="noise"), "undecided", ("matched",)),
    "combination": (
        dict(OFF, sampling="noise", sampler="noise", resolution="noise", matched="picture"), "combination", ()
    ),
    "patches next": (
        dict(OFF, sampling="noise", sampler="noise", resolution="noise", matched="noise"), "undecided", ("plain",)
    ),
    "patches": (
        dict(OFF, sampling="noise", sampler="noise", resolution="noise", matched="noise", plain="picture"),
        "patches", (),
    ),
    "nothing helps": (
        dict(OFF, sampling="noise", sampler="noise", resolution="noise", matched="noise", plain="= matched"),
        "undecided", (),
    ),
    "no regions in it": (
        dict(BAD, regions_off="= first_pass", sampling="noise", sampler="picture", resolution="= regions_off"),
        "sampler", (),
    ),
    "skipped in a circle": (dict(workflow="noise", baseline="= files", files="= baseline"), "undecided", ()),
}  # fmt: skip


@pytest.mark.parametrize("name", BRANCHES)
def test_verdict(name):
    kinds, fault, missing = BRANCHES[name]
    rows = table(**kinds)
    found = verdict.verdict(rows)
    assert (found.fault, found.missing) == (fault, missing)
    assert found == verdict.verdict(reversed(rows)), "the order of the rows does not count"
    assert found.decided == (fault != "undecided")
    assert "{" not in found.summary
    if kinds and fault != "undecided":
        assert found.evidence


def test_every_verdict_asks_for_tests_that_lead_on():
    """From nothing, running what is missing ends, whatever the results are."""
    rng = np.random.default_rng(3)
    kinds = ["picture", "noise", "blank", "unclear", "failed", "skipped"]
    chances = [0.4, 0.4, 0.05, 0.05, 0.05, 0.05]
    leaves = set()
    for _ in range(2000):
        results: dict[str, str] = {}
        for _ in range(len(TESTS) + 1):
            found = verdict.verdict(table(**results))
            if not found.missing:
                break
            results |= {test: str(rng.choice(kinds, p=chances)) for test in found.missing}
        else:
            pytest.fail(f"it goes on: {results}")
        leaves.add(found.fault)
    assert leaves >= {"none", "model_stack", "files", "later_pass", "regions", "override", "sampling", "undecided"}


def test_two_halves_are_evidence():
    halves = dataclasses.replace(noise_measures(), halves=3.0)
    rows = [r if r.test != "workflow" else dataclasses.replace(r, measures=halves) for r in table(**OFF)]
    assert any("two halves" in line for line in verdict.verdict(rows).evidence)


# ---- the tests as prompts


def connected(prompt, start=END):
    """The class of each node that leads to the end, and that nothing else is there."""
    seen, waiting = {}, [start]
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen[name] = prompt[name]["class_type"]
            waiting += [v[0] for v in prompt[name]["inputs"].values() if isinstance(v, list)]
    assert set(seen) == set(prompt), "nodes that lead nowhere would be validated, or run"
    return sorted(seen.values())


def sampler_of(prompt):
    return next(n["inputs"] for n in prompt.values() if n["class_type"] == "KSampler")


def test_the_seeds_workflow():
    original = workflow()
    kept = copy.deepcopy(original)
    found = planned(original)
    assert list(found) == list(TESTS)
    assert original == kept
    for ablation in found.values():
        if ablation.prompt is not None:
            kinds = connected(ablation.prompt)
            assert "PreviewImage" in kinds and "SaveImage" not in kinds, "the server's output folder stays as it was"

    baseline = connected(found["baseline"].prompt)
    loaders, rest = ["CLIPLoader", "UNETLoader", "VAELoader"], ["EmptyLatentImage", "KSampler", "PreviewImage"]
    assert baseline == sorted([*loaders, *rest, "CLIPTextEncode", "CLIPTextEncode", "VAEDecode"])
    official = sampler_of(found["baseline"].prompt)
    assert (official["sampler_name"], official["scheduler"], official["steps"], official["cfg"]) == (
        "euler", "simple", 30, 4.0,
    )  # fmt: skip
    assert official["seed"] == 1, "the workflow's"
    files = {v for n in found["baseline"].prompt.values() for v in n["inputs"].values() if isinstance(v, str)}
    assert {"sub/anima-base-v1.0.safetensors", "qwen_3_06b_base.safetensors", "qwen_image_vae.safetensors"} <= files
    files = {v for n in found["files"].prompt.values() for v in n["inputs"].values() if isinstance(v, str)}
    assert {"mine.safetensors", "clip.safetensors", "anima_vae.safetensors"} <= files

    assert found["first_pass"].same_as == "workflow"
    assert "AnimaApplyRegionalAttentionHook" not in connected(found["regions_off"].prompt)
    assert sampler_of(found["regions_off"].prompt)["positive"] == ["11", 0]
    assert found["zero_strength"].prompt["13"]["inputs"]["strength"] == 0.0

    patched = found["sampling"].prompt
    node_of_patch = next(n for n in patched if patched[n]["class_type"] == "ModelSamplingAuraFlow")
    assert patched[node_of_patch]["inputs"] == {"model": ["1", 0], "shift": 3.0}
    assert sampler_of(patched)["model"] == [node_of_patch, 0]
    assert sampler_of(found["sampler"].prompt)["scheduler"] == "simple"
    assert found["resolution"].prompt is None and found["resolution"].same_as == "regions_off"
    assert found["shapes"].prompt["14"]["inputs"]["debug_shapes"] is True
    assert found["shapes"].prompt["15"]["inputs"]["steps"] < 40
    assert found["attention_off"].prompt["14"]["inputs"]["attention_backend"] == "basic"
    kinds = connected(found["attention_off"].prompt)
    assert "ModelAttentionBackend" not in kinds, "on the model it would take the place of the hook's override"


def test_a_patched_workflow_has_nothing_to_patch():
    found = planned(workflow(patched=True))
    assert found["sampling"].prompt is None and found["sampling"].same_as == "regions_off"
    assert "already" in found["sampling"].why


@pytest.mark.parametrize("change", ["shift", "only the sampler", "twice"])
def test_the_patch_is_put_right(change):
    prompt = workflow(patched=True, shift=1.0 if change == "shift" else 3.0)
    if change == "only the sampler":
        prompt["12"]["inputs"]["model"] = prompt["14"]["inputs"]["model"] = ["1", 0]
    if change == "twice":
        prompt["21"] = node("ModelSamplingAuraFlow", model=["20", 0], shift=5.0)
        prompt["15"]["inputs"]["model"] = ["21", 0]
    found = planned(prompt)["sampling"]
    if change == "only the sampler":
        # With the regions off, which this test is made on, the sampler alone takes the model.
        assert found.prompt is not None or found.same_as == "regions_off"
        return
    patches = [n for n in found.prompt.values() if n["class_type"] == "ModelSamplingAuraFlow"]
    assert [p["inputs"] for p in patches] == [{"model": ["1", 0], "shift": 3.0}]


def test_other_patches_are_removed_and_loras_stay():
    prompt = workflow()
    prompt["30"] = node("LoraLoaderModelOnly", model=["1", 0], lora_name="anima-turbo-lora-v0.2.safetensors")
    prompt["31"] = node("PathchSageAttentionKJ", model=["30", 0], sage_attention="auto")
    prompt["15"]["inputs"]["model"] = ["31", 0]
    found = planned(prompt)
    kinds = connected(found["attention_off"].prompt)
    assert "PathchSageAttentionKJ" not in kinds and "LoraLoaderModelOnly" in kinds
    turbo = sampler_of(found["sampler"].prompt)
    assert (turbo["steps"], turbo["cfg"]) == (8, 1.0)
    assert "LoraLoaderModelOnly" not in connected(found["baseline"].prompt)
    plain = connected(found["plain"].prompt)
    assert "ModelAttentionBackend" in plain, "without the hook, a node may choose the attention"
    chosen = next(n["inputs"] for n in found["plain"].prompt.values() if n["class_type"] == "ModelAttentionBackend")
    assert chosen == {"model": ["1", 0], "attention": "pytorch attention"}


def test_no_vae_and_no_text_encoder():
    prompt = {
        "1": node("UNETLoader", unet_name="mine.safetensors"),
        "2": node("EmptyLatentImage", width=192, height=128, batch_size=1),
        "3": node("Prompt", text="a"),
        "4": node("KSampler", model=["1", 0], positive=["3", 0], negative=["3", 0], latent_image=["2", 0], seed=5),
        "5": node("SaveLatent", samples=["4", 0], filename_prefix="x"),
    }
    info = {**OBJECT_INFO, "Prompt": fake_comfyui._node("CONDITIONING", text="STRING"), "CLIPLoader": {}}
    found = {a.test: a for a in plan(prompt, info, Official(size=(64, 64), steps=2))}
    assert connected(found["baseline"].prompt) == ["EmptyLatentImage", "KSampler", "Prompt", "SaveLatent", "UNETLoader"]
    assert sampler_of(found["baseline"].prompt)["steps"] == 2
    assert found["files"].same_as == "baseline"
    assert found["first_pass"].same_as == "workflow"
    assert found["regions_off"].same_as == "first_pass"


def test_custom_sampling_and_a_second_pass():
    prompt = workflow()
    prompt["15"] = node(
        "SamplerCustomAdvanced", noise=["40", 0], guider=["41", 0], sampler=["42", 0], sigmas=["43", 0],
        latent_image=["2", 0],
    )  # fmt: skip
    prompt["40"] = node("RandomNoise", noise_seed=["47", 0])
    prompt["47"] = node("PrimitiveInt", value=77)
    prompt["41"] = node("CFGGuider", model=["1", 0], positive=["14", 0], negative=["14", 1], cfg=9.0)
    prompt["42"] = node("KSamplerSelect", sampler_name="ddim")
    prompt["43"] = node("BasicScheduler", model=["1", 0], scheduler="karras", steps=10, denoise=1.0)
    prompt["44"] = node("LatentUpscaleBy", samples=["15", 1], scale_by=1.5)
    prompt["45"] = node("KSampler", **{**workflow()["15"]["inputs"], "latent_image": ["44", 0], "denoise": 0.4})
    prompt["16"]["inputs"]["samples"] = ["45", 0]
    found = planned(prompt)
    assert "LatentUpscaleBy" in connected(found["workflow"].prompt)
    first = connected(found["first_pass"].prompt)
    assert "SamplerCustomAdvanced" in first and "LatentUpscaleBy" not in first
    official = sampler_of(found["sampler"].prompt)
    assert official["seed"] == 77 and official["model"] == ["1", 0] and official["positive"] == ["11", 0]
    connected(found["sampler"].prompt)


def test_a_latent_from_a_picture_keeps_its_size():
    prompt = workflow()
    prompt["50"] = node("LoadImage", image="a.png")
    prompt["2"] = node("VAEEncode", pixels=["50", 0], vae=["19", 0])
    found = planned(prompt)["resolution"]
    assert found.prompt is None and "made from a picture" in found.why


def test_nothing_to_test():
    with pytest.raises(ValueError, match="no sampler"):
        plan({"1": node("UNETLoader", unet_name="a")}, OBJECT_INFO)
    with pytest.raises(ValueError, match="without a model"):
        plan({"1": node("KSampler", model="a")}, OBJECT_INFO)


def test_cycles_end():
    prompt = workflow()
    prompt["2"] = node("LatentUpscaleBy", samples=["16", 0], scale_by=1.0)
    prompt["16"]["inputs"]["samples"] = ["2", 0]
    prompt["1"] = node("LoraLoaderModelOnly", model=["1", 0], lora_name="a")
    assert len(plan(prompt, OBJECT_INFO)) == len(TESTS)


# ---- the environment


def test_environment():
    lines = ["Using sage attention", "model weight dtype torch.bfloat16, manual cast: None", "noise"]
    found = facts({"system_stats": fake_comfyui.STATS, "object_info": OBJECT_INFO, "log": lines})
    assert found["facts"]["ComfyUI"] == "0.38.1"
    assert found["facts"]["CUDA"] == "13.0"
    assert found["facts"]["attention"] == "sage"
    assert found["facts"]["flags"] == ["--use-sage-attention"]
    assert found["facts"]["dtypes"] == {"model": "torch.bfloat16"}
    assert found["facts"]["packs"] == ["anima-regional-comfy-nodes", "kjnodes"]
    assert found["facts"]["attention nodes"]["kjnodes"] == ["PathchSageAttentionKJ"]
    assert "nvidia-smi" in found["unknown"]["driver"]
    silent = facts({"system_stats": {"system": {}, "devices": [{"type": "cpu", "name": "cpu"}]}, "log": []})
    assert {"attention", "torch", "dtypes"} <= set(silent["unknown"])
    assert silent["facts"]["driver"] == "none: it runs on the CPU"


# ---- servers


@pytest.fixture
def fake():
    with FakeComfyUI() as server:
        yield server


def connect(server, **options):
    from anima_fast.doctor.server import Server

    return Server(server.address, **{"timeout": 5, "patience": 30, **options})


def has(prompt, kind, **values):
    return any(
        n["class_type"] == kind and all(n["inputs"].get(k) == v for k, v in values.items()) for n in prompt.values()
    )


def regional(prompt):
    return has(prompt, "AnimaApplyRegionalAttentionHook")


PLANTED = {
    # fault: (the workflow, what a good prompt is)
    "model_stack": (workflow(), lambda p: False),
    "files": (workflow(), lambda p: not has(p, "UNETLoader", unet_name="mine.safetensors")),
    "sampling": (workflow(patched=True, shift=1.0), lambda p: not has(p, "ModelSamplingAuraFlow", shift=1.0)),
    "sampler": (workflow(sampler="ddim"), lambda p: not has(p, "KSampler", sampler_name="ddim")),
    "resolution": (workflow(size=(2048, 2048)), lambda p: not has(p, "EmptyLatentImage", width=2048)),
    "combination": (
        workflow(sampler="ddim", size=(2048, 2048)),
        lambda p: not has(p, "KSampler", sampler_name="ddim") and not has(p, "EmptyLatentImage", width=2048),
    ),
    "regions": (workflow(), lambda p: not regional(p) or has(p, "AnimaBuildRegionalCrossAttnBias", strength=0.0)),
    "attention_conflict": (
        workflow(),
        lambda p: not regional(p) or has(p, "AnimaApplyRegionalAttentionHook", attention_backend="basic"),
    ),
    "override": (workflow(), lambda p: not regional(p)),
    "none": (workflow(), lambda p: True),
}


@needs_client
@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("fault", PLANTED)
def test_a_planted_fault_is_found(fault, everything, fake):
    prompt, good = PLANTED[fault]

    def draw(prompt):
        line = "model weight dtype torch.bfloat16, manual cast: torch.float16"
        fake.log.append({"t": "2", "m": f"\x1b[32m[INFO]\x1b[0m {line}\n"})
        return picture() if good(prompt) else noise(step=0.1)

    fake.draw = draw
    told = []
    with connect(fake) as server:
        run = live.run(prompt, server, everything=everything, tell=lambda *args: told.append(args))
    assert run.verdict.fault == fault, run.verdict
    assert run.stopped is None
    assert told and all(number <= count for _, number, count, _ in told)
    rows = {row.test: row for row in run.rows}
    if everything:
        assert list(rows) == list(TESTS)
    for test, row in rows.items():
        assert (test in run.pictures) == (row.status == "measured")
    assert run.environment["facts"]["dtypes"] == {"model": "torch.bfloat16, computed in torch.float16"}
    assert {path for method, path in fake.requests if method == "POST"} == {"/prompt"}, "only its queue is changed"


@needs_client
def test_the_tree_asks_for_no_more_than_it_needs(fake):
    fake.draw = lambda p: picture()
    with connect(fake) as server:
        live.run(workflow(), server)
    assert len(fake.queued) == 1, "the workflow works"


@needs_client
def test_a_test_that_fails_is_told(fake):
    def draw(prompt):
        if has(prompt, "KSampler", scheduler="normal"):
            raise RuntimeError("mat1 and mat2 shapes\ncannot be multiplied")
        return picture()

    fake.draw = draw
    with connect(fake) as server:
        run = live.run(workflow(), server)
    assert run.verdict.fault == "does_not_run"
    row = next(row for row in run.rows if row.test == "workflow")
    assert "node 9 (KSampler): RuntimeError: mat1 and mat2 shapes cannot be multiplied" in row.why


@needs_client
def test_refused(fake):
    from anima_fast.doctor.server import Refused

    problem = {"type": "value_not_in_list", "message": "Value not in list", "details": "vae_name: 'x' not in []"}
    fake.refuse = {"19": {"errors": [{**problem, "extra_info": {"input_name": "vae_name"}}], "class_type": "VAELoader"}}
    with connect(fake) as server:
        with pytest.raises(Refused, match=r"node 19 \(VAELoader\): vae_name: Value not in list \(vae_name: 'x'"):
            live.submit(workflow(), server)
        run = live.run(workflow(), server)
    assert {row.status for row in run.rows} <= {"failed", "skipped"}
    assert run.verdict.fault == "model_stack", "not even the baseline is taken"


@needs_client
def test_submit(fake):
    fake.draw = lambda p: picture()
    told = []
    with connect(fake) as server:
        found = live.submit(workflow(), server, told.append)
    assert found.result.status == "success"
    assert [file.node for file, _ in found.files] == ["17"]
    assert found.files[0][1] == picture()
    assert any(step.done == 2 and step.total == 2 for step in told)
    assert fake.queued == [workflow()], "as it is"


@needs_client
def test_dies_half_way(fake):
    fake.die_after, fake.steps = 1, 3
    began = time.monotonic()
    with connect(fake) as server:
        run = live.run(workflow(), server)
    assert "no server at" in run.stopped or "broke off" in run.stopped
    assert run.verdict.fault == "undecided" and run.rows == []
    assert time.monotonic() - began < 15


@needs_client
def test_dies_after_some_tests(fake):
    fake.draw = lambda p: noise()
    fake.steps, fake.pause = 20, 0.02

    def tell(test, *_):
        if test == "baseline":
            fake.die_after = 1

    with connect(fake) as server:
        run = live.run(workflow(), server, tell=tell)
    assert run.stopped and [row.test for row in run.rows] == ["workflow"]
    assert run.verdict.missing == ("baseline",)


@needs_client
def test_down():
    from anima_fast.doctor.server import Server, ServerError

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(ServerError, match=f"no server at http://{address}.*is ComfyUI running there"):
        Server(address).system_stats()


@needs_client
@pytest.mark.parametrize(
    ("path", "answer", "message"),
    [
        ("/system_stats", (200, {}, b"<html>"), "does not answer with JSON; is this ComfyUI"),
        ("/system_stats", (200, {}, b"[1]"), "not as ComfyUI does"),
        ("/system_stats", (404, {}, b""), "HTTP 404; is this ComfyUI"),
        ("/system_stats", (500, {}, b""), "HTTP 500"),
        ("/system_stats", (302, {"Location": "http://127.0.0.1:1/"}, b""), "another address, which is not followed"),
        ("/system_stats", (401, {}, b""), "asks for a login"),
        ("/object_info", (200, {}, b"{}"), "no /object_info"),
        ("/system_stats", (200, {}, b"[" * 100000), "does not answer with JSON"),
    ],
)
def test_something_else_answers(fake, path, answer, message):
    from anima_fast.doctor.server import ServerError

    fake.answers[path] = answer
    with connect(fake) as server, pytest.raises(ServerError, match=message):
        server.environment()


@needs_client
@pytest.mark.parametrize("kind", ["hang", "drip"])
def test_slow(fake, kind):
    from anima_fast.doctor.server import ServerError

    getattr(fake, kind).add("/object_info")
    began = time.monotonic()
    with connect(fake, timeout=0.6) as server, pytest.raises(ServerError, match=r"/object_info took over 0.6 s"):
        server.environment()
    assert time.monotonic() - began < 5


@needs_client
def test_refuses_connections_of_the_websocket(fake):
    from anima_fast.doctor.server import ServerError

    fake.answers["/ws"] = (403, {}, b"")
    fake.websocket = lambda request, client: request.send_error(403)
    with connect(fake) as server, pytest.raises(ServerError, match="opens no websocket"):
        live.submit(workflow(), server)


@needs_client
def test_patience(fake):
    from anima_fast.doctor.server import ServerError

    fake.steps, fake.pause = 100, 0.1
    with (
        connect(fake, patience=1.5) as server,
        pytest.raises(ServerError, match=r"did not end within 1.5 s \(last at node"),
    ):
        live.submit(workflow(), server)
    assert fake.interrupted == [fake.running], "it is taken back"


@needs_client
def test_a_prompt_that_vanishes(fake):
    from anima_fast.doctor.server import ServerError

    fake.forget = True
    with connect(fake) as server, pytest.raises(ServerError, match="neither its queue nor its history"):
        live.submit(workflow(), server)


@needs_client
def test_waiting_behind_others_and_interrupted(fake):
    """Ctrl-C while waiting: our prompt is deleted, the one of somebody else's is left alone."""
    fake.busy = "somebody-elses"

    def tell(test, number, count, step):
        if step.ahead:
            raise KeyboardInterrupt

    with connect(fake) as server:
        run = live.run(workflow(), server, tell=tell)
        assert run.interrupted and run.stopped == "interrupted"
        (waiting,) = [number for _, number in fake.waiting]
    assert fake.deleted == [waiting] and fake.waiting == []
    assert fake.interrupted == []


@needs_client
def test_interrupted_while_running(fake):
    fake.steps, fake.pause = 100, 0.05

    def tell(test, number, count, step):
        if step.done >= 2:
            raise KeyboardInterrupt

    with connect(fake) as server:
        run = live.run(workflow(), server, tell=tell)
    assert run.interrupted and run.verdict.missing == ("workflow", "baseline")
    assert fake.interrupted == [fake.running] and None not in fake.interrupted


@needs_client
def test_a_lost_websocket_is_opened_anew(fake):
    fake.steps, fake.pause = 30, 0.05
    lost = threading.Event()

    def tell(step):
        if step.done == 3 and not lost.is_set():
            lost.set()
            next(iter(fake.sockets.values())).shutdown(socket.SHUT_RDWR)

    with connect(fake) as server:
        found = live.submit(workflow(), server, tell)
    assert found.result.status == "success" and lost.is_set()


@needs_client
@pytest.mark.parametrize(
    "address",
    ["", "ftp://a", "http://", "http://a:99999999", "http://a b", "http://a/?x=1", "http://[::1", "http://a:0"],
)
def test_no_address(address):
    from anima_fast.doctor.server import Server

    with pytest.raises(ValueError, match="--comfyui: got .*allowed: an address such as"):
        Server(address)


@needs_client
def test_proxies_of_the_environment_are_not_used(fake, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    with connect(fake) as server:
        assert live.submit(workflow(), server).result.status == "success"


def test_without_the_packages(monkeypatch):
    from anima_fast.doctor.server import Server, ServerError

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ServerError, match=r"pip install 'anima-fast\[doctor\]'"):
        Server("127.0.0.1:8188")


def test_unclear_counts_by_the_baseline():
    """Structured noise beside a clear picture fails; what is nearly as steep as the picture stays undecided."""
    base = noise_measures()
    clear = Row("baseline", "measured", dataclasses.replace(base, kind="picture", slope=-2.4))
    others = table(files="= baseline", first_pass="= workflow", regions_off="picture", zero_strength="picture")
    for slope, fault in ((-0.9, "regions"), (-1.8, "undecided")):
        row = Row("workflow", "measured", dataclasses.replace(base, kind="unclear", slope=slope))
        assert verdict.verdict([clear, row, *others]).fault == fault


# ---- the report


@needs_client
def test_reports(fake, tmp_path):
    from html.parser import HTMLParser

    from anima_fast.doctor import report

    prompt, good = PLANTED["sampling"]
    fake.draw = lambda p: picture(0, 512) if good(p) else noise(0, 512)
    with connect(fake) as server:
        run = live.run(prompt, server, everything=True)
    finding = {"severity": "error", "id": "shift", "summary": "<b>1|0</b>", "why": "", "fix": "3"}
    for name in ("r.html", "r.md"):
        report.write(tmp_path / name, run, findings=[finding], workflow="<script>.json")
        text = (tmp_path / name).read_text()
        assert run.verdict.summary in text
        assert all(row.test in text for row in run.rows)
        assert "<script>" not in text and "<b>1" not in text, "what comes from files is escaped"
        assert "sage" in text and "nvidia-smi" in text, "the environment, and what is unknown of it"
    page = (tmp_path / "r.html").read_text()
    sources = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: sources.extend(
        value for name, value in attributes if name in ("src", "href")
    )
    parser.feed(page)
    assert len(sources) == len(run.pictures) and all(s.startswith("data:") for s in sources), "self-contained"
    assert {f.stem for f in (tmp_path / "r_pictures").iterdir()} == set(run.pictures)
    with pytest.raises(ValueError, match="ends in .html or .md"):
        report.write(tmp_path / "r.pdf", run)
    with pytest.raises(FileNotFoundError, match="directory"):
        report.write(tmp_path / "none" / "r.md", run)


@needs_client
def test_a_report_of_an_interrupted_run(fake, tmp_path):
    from anima_fast.doctor import report

    fake.die_after = 1
    with connect(fake) as server:
        run = live.run(workflow(), server)
    for name in ("r.html", "r.md"):
        report.write(tmp_path / name, run)
        assert "The run stopped" in (tmp_path / name).read_text()


def test_widgets_that_an_old_workflow_does_not_have():
    """The pack's first version had no strength and no choice of attention; the server's nodes have defaults."""
    prompt = workflow()
    del prompt["13"]["inputs"]["strength"], prompt["14"]["inputs"]["attention_backend"]
    found = planned(prompt)
    assert found["zero_strength"].prompt["13"]["inputs"]["strength"] == 0.0
    assert found["attention_off"].prompt["14"]["inputs"]["attention_backend"] == "basic"


def test_a_prompt_that_would_run_twice_runs_once():
    """With only the sampler's settings off, all three together are that one test."""
    found = planned(workflow(patched=True))
    assert found["sampler"].prompt is not None
    assert found["matched"].prompt is None and found["matched"].same_as == "sampler"
