"""Doctor's live side on a real server: random weights make noise of everything, and that is what it must say."""

from __future__ import annotations

import os
import time

import pytest

pytest.importorskip("httpx2", reason="needs the extra doctor")
pytest.importorskip("websocket", reason="needs the extra doctor")

from anima_fast.doctor import live
from anima_fast.doctor.ablations import Official
from anima_fast.doctor.server import Refused, Server
from anima_fast.doctor.verdict import TESTS

#: A measure needs some frequencies: 32 latent pixels each way.
SIZE = {"width": 256, "height": 256}
SMALL = Official(size=(256, 256), steps=1)
PACK = os.environ.get("ANIMA_FAST_REGIONAL_NODES")
needs_pack = pytest.mark.skipif(
    not PACK, reason="needs anima-regional-comfy-nodes: set ANIMA_FAST_REGIONAL_NODES to a checkout of it"
)


@pytest.fixture(scope="module")
def address(comfy, tmp_path_factory):
    import live_server

    base = tmp_path_factory.mktemp("comfyui")
    with live_server.started(base) as address:
        yield address
    assert not list((base / "output").rglob("*.png")), "doctor leaves the output folder as it was"


@pytest.fixture
def server(address):
    with Server(address) as server:
        yield server


def node(kind, **inputs):
    return {"class_type": kind, "inputs": inputs}


def base(**changed):
    run = {"seed": 1, "steps": 2, "cfg": 4.5, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}
    return {
        "1": node("UNETLoader", unet_name="tiny.safetensors", weight_dtype="default"),
        "2": node("EmptyLatentImage", **SIZE, batch_size=1),
        "3": node("TinyPrompt", tokens=20, seed=1),
        "4": node("TinyPrompt", tokens=12, seed=3),
        "5": node("TinyPrompt", tokens=15, seed=4),
        "6": node("TinyPrompt", tokens=9, seed=2),
        "7": node("SolidMask", value=0.0, **SIZE),
        "8": node("SolidMask", value=1.0, width=128, height=256),
        "9": node("MaskComposite", destination=["7", 0], source=["8", 0], x=0, y=0, operation="add"),
        "10": node("MaskComposite", destination=["7", 0], source=["8", 0], x=128, y=0, operation="add"),
        "15": node("KSampler", model=["1", 0], latent_image=["2", 0], **{**run, **changed}),
        "16": node("VAEDecode", samples=["15", 0], vae=["19", 0]),
        "17": node("SaveImage", images=["16", 0], filename_prefix="out"),
        "19": node("VAELoader", vae_name="tiny_vae.safetensors"),
    }


def ours():
    """With the regions of this repository."""
    prompt = base()
    for name, text, mask in (("12", "4", "9"), ("13", "5", "10")):
        prompt[name] = node(
            "AnimaFastRegion", conditioning=[text, 0], mask=[mask, 0], strength=1.0, priority=0, name=name
        )
    links = {"model": ["1", 0], "base": ["3", 0], "negative": ["6", 0]}
    links |= {"regions.region0": ["12", 0], "regions.region1": ["13", 0]}
    prompt["14"] = node("AnimaFastRegions", **links)
    prompt["15"]["inputs"] |= {"model": ["14", 0], "positive": ["14", 1], "negative": ["14", 2]}
    return prompt


def seeds():
    """The seed's: its pack, no sampling patch."""
    prompt = base()
    prompt["11"] = node(
        "AnimaRegionalConditioningConcat", region_1=["4", 0], region_2=["5", 0], base=["3", 0], base_position="last"
    )
    prompt["12"] = node(
        "AnimaMaskToTokenGrid", model=["1", 0], latent=["2", 0], mask_1=["9", 0], mask_2=["10", 0],
        downscale_mode="area", normalize_overlaps=True,
    )  # fmt: skip
    prompt["13"] = node(
        "AnimaBuildRegionalCrossAttnBias", ranges=["11", 1], token_weights=["12", 0], mode="soft_log", eps=0.001,
        hard_value=-80.0, strength=0.35, base_always_allowed=True, unmasked_to_base=True,
    )  # fmt: skip
    prompt["14"] = node(
        "AnimaApplyRegionalAttentionHook", positive=["11", 0], negative=["6", 0], bias_template=["13", 0],
        model=["1", 0], apply_to_cross_attn_only=True, attention_backend="orig", start_percent=0.2, end_percent=1.0,
        debug_shapes=False,
    )  # fmt: skip
    prompt["15"]["inputs"] |= {"positive": ["14", 0], "negative": ["14", 1]}
    return prompt


def with_defaults(prompt, server):
    """Widgets that are not given, at their default, as the user interface would send them."""
    info = server.object_info()
    for one in prompt.values():
        groups = info[one["class_type"]]["input"]
        for name, spec in {**groups.get("required", {}), **groups.get("optional", {})}.items():
            if len(spec) > 1 and "default" in spec[1]:
                one["inputs"].setdefault(name, spec[1]["default"])
    return prompt


@pytest.mark.parametrize("make", [ours, pytest.param(seeds, marks=needs_pack)])
def test_all_tests_on_random_weights(server, make):
    prompt = with_defaults(make(), server)
    run = live.run(prompt, server, official=SMALL, everything=True)
    rows = {row.test: row for row in run.rows}
    assert list(rows) == list(TESTS)
    failed = {test: row.why for test, row in rows.items() if row.status == "failed"}
    assert not failed
    kinds = {rows["workflow"].kind, rows["baseline"].kind}
    assert kinds <= {"noise", "unclear"}, "random weights make no pictures"
    assert run.verdict.fault == ("model_stack" if kinds == {"noise"} else "undecided")
    for test in ("regions_off", "sampling", "sampler", "resolution", "matched", "attention_off"):
        assert rows[test].status == "measured" or rows[test].same_as, rows[test]
    assert rows["regions_off"].difference > 1e-3, "regions must have acted"
    # Current ComfyUI builds shift 3 into Anima: with the node, the picture is the very same.
    assert any("ModelSamplingAuraFlow" in change for change in rows["sampling"].changes)
    off, patched = (live.measure.decode(run.pictures[test]) for test in ("regions_off", "sampling"))
    assert live.measure.difference(off, patched) == 0
    if make is ours:
        assert any("q [2, 16, 256, 16]" in line for line in rows["shapes"].log), rows["shapes"].log
        assert "AnimaFastRegions" in str(rows["zero_strength"].changes)
    else:
        assert rows["zero_strength"].difference == rows["regions_off"].difference, "no bias is no region"
        assert rows["attention_off"].difference < 1e-3, "attention_basic computes the same"
        assert any("n_q=256 n_k=512" in line for line in rows["shapes"].log), rows["shapes"].log


def test_environment(server):
    found = server.environment()
    assert found["facts"]["ComfyUI"] and found["facts"]["torch"]
    assert found["facts"]["attention"] in ("sub_quad", "pytorch", "split")
    assert "--cpu" in found["facts"]["flags"]
    assert "anima_fast" in found["facts"]["packs"]
    assert "KSampler" in found["object_info"]


def test_refused(server):
    prompt = with_defaults(ours(), server)
    prompt["19"]["inputs"]["vae_name"] = "none.safetensors"
    with pytest.raises(Refused, match=r"node 19 \(VAELoader\): vae_name: Value not in list") as error:
        server.queue(prompt)
    assert set(error.value.nodes) == {"19"}


def test_submit(server):
    prompt = with_defaults(ours(), server)
    prompt["17"] = node("PreviewImage", images=["16", 0])
    told = []
    found = live.submit(prompt, server, told.append)
    assert found.result.status == "success"
    assert live.measure.decode(found.files[0][1]).shape == (3, 256, 256)
    assert any(step.total == 2 and step.done for step in told)


def test_interrupted(address):
    """The prompt that runs is stopped and the one that waits deleted: the server is idle at once."""
    with Server(address) as server:
        prompt = with_defaults(ours(), server)
        prompt["15"]["inputs"]["steps"] = 500

        def tell(test, number, count, step):
            if step.done >= 2:
                raise KeyboardInterrupt

        run = live.run(prompt, server, official=SMALL, tell=tell)
        assert run.interrupted
    with Server(address) as server:
        for _ in range(100):
            if server._queued() == ([], []):
                break
            time.sleep(0.1)
        assert server._queued() == ([], [])
