"""A headless ComfyUI server with this repository in custom_nodes: nodes listed, a workflow finished, errors said."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import tiny_anima

sys.path.append(str(Path(__file__).parents[1]))
import tiny_encoder

ROOT = Path(__file__).parents[2]
CHECKOUT = os.environ.get("ANIMA_FAST_COMFYUI", "")

# A text encoder would be 1.2 GB of random numbers: the test brings a node with what one would say, and nodes with what
# other packs may hand on.
PROMPTS = """
import sys
import types
sys.path.append({here!r})
import tiny_anima
import torch

class TinyPrompt:
    INPUT_TYPES = classmethod(lambda cls: {{"required": {{"tokens": ("INT",), "seed": ("INT",), "entries": ("INT",)}}}})
    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "make"
    CATEGORY = "test"

    def make(self, tokens, seed, entries):
        return (tiny_anima.conditioning(tokens, seed) * entries,)

class Flux:
    pass

class Odd:
    INPUT_TYPES = classmethod(lambda cls: {{"required": {{"what": ("STRING",)}}}})
    RETURN_TYPES = ("MASK", "CONDITIONING", "MODEL")
    FUNCTION = "make"
    CATEGORY = "test"

    def make(self, what):
        mask = torch.ones(2 if what == "batch" else 1, 0 if what == "empty" else 128, 192)
        if what == "nan":
            mask[0, :2, :3] = float("nan")
        if what == "bytes":
            mask *= 255
        text = tiny_anima.conditioning(12, 3, text=768)
        return (mask, text, types.SimpleNamespace(model=Flux()))

NODE_CLASS_MAPPINGS = {{"TinyPrompt": TinyPrompt, "Odd": Odd}}
"""


@pytest.fixture(scope="module")
def server(comfy, tmp_path_factory):
    from safetensors.torch import save_file

    base = tmp_path_factory.mktemp("comfyui")
    models, custom = base / "models" / "diffusion_models", base / "custom_nodes"
    models.mkdir(parents=True)
    custom.mkdir()
    save_file(tiny_anima.state_dict(), models / "tiny.safetensors")
    encoders = base / "models" / "text_encoders"
    encoders.mkdir()
    tiny_encoder.save(encoders / "qwen.safetensors", dataclasses.replace(tiny_encoder.CONFIG, head_size=1024))
    (custom / "anima_fast").symlink_to(ROOT, target_is_directory=True)
    (custom / "tiny_prompt.py").write_text(PROMPTS.format(here=str(Path(__file__).parent)))
    page = base / "page"
    page.mkdir()
    (page / "index.html").write_text("<html></html>")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "main.py", "--cpu", "--listen", "127.0.0.1", "--port", str(port)]
    command += ["--base-directory", str(base), "--front-end-root", str(page), "--disable-api-nodes"]
    command += ["--database-url", "sqlite:///:memory:"]
    with (base / "log.txt").open("w") as log:
        process = subprocess.Popen(command, cwd=CHECKOUT, stdout=log, stderr=subprocess.STDOUT)
    server = Server(f"http://127.0.0.1:{port}", base / "log.txt")
    try:
        for _ in range(240):
            assert process.poll() is None, f"the server ended:\n{server.log()}"
            try:
                server.get("/system_stats")
                break
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.5)
        else:
            pytest.fail(f"the server did not come up:\n{server.log()}")
        yield server
    finally:
        process.terminate()
        process.wait(30)


class Server:
    def __init__(self, address, log):
        self._address, self._log = address, log

    def log(self):
        return self._log.read_text()

    def get(self, path):
        with urllib.request.urlopen(self._address + path, timeout=20) as answer:
            return json.load(answer)

    def _post(self, prompt):
        body = json.dumps({"prompt": prompt}).encode()
        request = urllib.request.Request(self._address + "/prompt", body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=20) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def refused(self, prompt):
        """What the front end writes on the nodes of a workflow that is not even queued: (node, message, details)."""
        code, answer = self._post(prompt)
        assert code == 400, answer
        errors = answer["node_errors"].items()
        return [(name, e["message"], e["details"]) for name, found in errors for e in found["errors"]]

    def queue(self, prompt):
        """The history entry of a finished workflow."""
        code, answer = self._post(prompt)
        assert code == 200, answer
        number = answer["prompt_id"]
        for _ in range(480):
            history = self.get(f"/history/{number}")
            if number in history:
                return history[number]
            time.sleep(0.25)
        return pytest.fail(f"not finished:\n{self.log()}")


def settings_of(server, node):
    """Every widget of a node at its default, as the front end would send it."""
    inputs = server.get(f"/object_info/{node}")[node]["input"]
    specs = [(name, (*spec, {})[:2]) for group in inputs.values() for name, spec in group.items()]
    defaults = {n: o["options"][0] for n, (kind, o) in specs if kind == "COMBO"}
    return defaults | {name: options["default"] for name, (_, options) in specs if "default" in options}


def node(kind, **inputs):
    return {"class_type": kind, "inputs": inputs}


def workflow(server, *, entries=1, **settings):
    nodes = {
        "model": node("UNETLoader", unet_name="tiny.safetensors", weight_dtype="default"),
        "base": node("TinyPrompt", tokens=20, seed=1, entries=1),
        "negative": node("TinyPrompt", tokens=9, seed=2, entries=1),
        "one": node("TinyPrompt", tokens=12, seed=3, entries=entries),
        "two": node("TinyPrompt", tokens=15, seed=4, entries=1),
        "half": node("SolidMask", value=1.0, width=96, height=128),
        "black": node("SolidMask", value=0.0, width=192, height=128),
    }
    place = {"destination": ["black", 0], "source": ["half", 0], "y": 0, "operation": "add"}
    plain = {"strength": 1.0, "priority": 0}
    for side, prompt, x in (("left", "one", 0), ("right", "two", 96)):
        nodes[f"mask of {side}"] = node("MaskComposite", x=x, **place)
        mask = [f"mask of {side}", 0]
        nodes[side] = node("AnimaFastRegion", conditioning=[prompt, 0], mask=mask, name=side, **plain)
    both = {"regions.region0": ["left", 0], "regions.region1": ["right", 0]}
    links = {"model": ["model", 0], "base": ["base", 0], "negative": ["negative", 0], **both}
    nodes["regions"] = node("AnimaFastRegions", **{**settings_of(server, "AnimaFastRegions"), **links, **settings})
    nodes["latent"] = node("EmptyLatentImage", width=192, height=128, batch_size=1)
    links = {"model": ["regions", 0], "positive": ["regions", 1], "negative": ["regions", 2]}
    run = {"seed": 1, "steps": 2, "cfg": 4.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
    nodes["sampler"] = node("KSampler", latent_image=["latent", 0], **links, **run)
    nodes["save"] = node("SaveLatent", samples=["sampler", 0], filename_prefix="regions")
    size = {"width": 192, "height": 128}
    nodes["preview"] = node("AnimaFastRegionPreview", normalize_overlaps=True, resample="area", **both, **size)
    return nodes


def test_object_info_lists_the_nodes(server):
    info = server.get("/object_info")
    ours = ("Region", "Regions", "Accelerate", "RegionPreview", "LoadQwen35CLIP")
    for name in (f"AnimaFast{node}" for node in ours):
        inputs = {**info[name]["input"]["required"], **info[name]["input"].get("optional", {})}
        silent = [key for key, spec in inputs.items() if not spec[1].get("tooltip")]
        assert not silent, f"{name}: no tooltip for {silent}"
    assert info["AnimaFastRegions"]["output"] == ["MODEL", "CONDITIONING", "CONDITIONING"]


def test_a_workflow_with_regions_finishes(server):
    done = server.queue(workflow(server, debug=True))
    assert done["status"]["status_str"] == "success", done["status"]
    assert done["outputs"]["save"]["latents"] and done["outputs"]["preview"]["images"]
    log = server.log()
    assert "Anima Regions: served 20 of 20 cross-attention calls." in log
    assert "Anima Regions: block 0, q [2, 16, 96, 16]" in log


def test_accelerate(server):
    prompt = workflow(server)
    prompt["regions"] = node("AnimaFastAccelerate", model=["model", 0], debug=False)
    prompt["sampler"]["inputs"].update(positive=["base", 0], negative=["negative", 0])
    assert server.queue(prompt)["status"]["status_str"] == "success"
    assert "Anima Accelerate: served 20 of 20" in server.log()


def test_the_large_text_encoder(server):
    prompt = workflow(server)
    prompt["clip"] = node("AnimaFastLoadQwen35CLIP", **settings_of(server, "AnimaFastLoadQwen35CLIP"))
    prompt["clip"]["inputs"]["clip_name"] = "qwen.safetensors"
    for name, text in (("base", "the sea at night"), ("negative", "blurry"), ("one", "a red (cat:1.3)")):
        prompt[name] = node("CLIPTextEncode", clip=["clip", 0], text=text)
    done = server.queue(prompt)
    assert done["status"]["status_str"] == "success", done["status"]


def failed(server, prompt):
    """(node, message) that the front end shows for a workflow that stops at a node."""
    status = server.queue(prompt)["status"]
    assert status["status_str"] == "error"
    (error,) = [content for kind, content in status["messages"] if kind == "execution_error"]
    return error["node_id"], error["exception_message"]


@pytest.mark.parametrize(
    ("change", "at", "message"),
    [
        ({"entries": 2}, "left", "left: conditioning: got a CONDITIONING with 2 entries"),
        ({"blocks": "3-1"}, "regions", "blocks: got '3-1'; allowed: numbers and ranges"),
        ({"blocks": "9-12"}, "regions", "blocks: got [9, 10, 11, 12]; allowed: numbers from 0 to 9, as this model has"),
        ({"start_percent": 0.8, "end_percent": 0.4}, "regions", "start_percent, end_percent: got 0.8 and 0.4"),
        ({"canvas_width": 512}, "regions", "canvas: got 512 x 0"),
        ({"crop_left": 1.0}, "regions", "crop: got"),
        ({"strength": float("nan")}, "regions", "strength: got nan; allowed: "),
    ],
)
def test_bad_settings_are_said_in_the_front_end(server, change, at, message):
    prompt = workflow(server, **change)
    del prompt["preview"]
    where, said = failed(server, prompt)
    assert where == at and message in said


ODD = {
    "a mask with NaN": ("nan", 0, "left", "mask", "left: mask: got 6 NaN or infinite values; allowed: finite values"),
    "two masks": ("batch", 0, "left", "mask", "left: mask: got a batch of 2 masks; allowed: one mask"),
    "a mask to 255": ("bytes", 0, "left", "mask", "allowed: [0, 1] (divide by 255?)"),
    "an empty mask": ("empty", 0, "left", "mask", "left: mask: got an empty mask"),
    "another encoder": ("", 1, "left", "conditioning", "left: conditioning: got text of 768 channels; allowed: 1024"),
    "another model": ("", 2, "regions", "model", "model: got a model of class Flux; allowed: an Anima model (Load"),
}


@pytest.mark.parametrize("name", ODD)
def test_what_other_nodes_give_wrongly_is_said_in_the_front_end(server, name):
    what, output, target, key, message = ODD[name]
    prompt = workflow(server)
    del prompt["preview"]
    prompt["odd"] = node("Odd", what=what)
    prompt[target]["inputs"][key] = ["odd", output]
    where, said = failed(server, prompt)
    assert where == ("left" if key == "mask" else "regions") and message in said


def test_accelerate_says_that_a_model_is_not_anima(server):
    prompt = workflow(server)
    prompt["odd"] = node("Odd", what="")
    prompt["regions"] = node("AnimaFastAccelerate", model=["odd", 2], debug=False)
    prompt["sampler"]["inputs"].update(positive=["base", 0], negative=["negative", 0])
    del prompt["preview"]
    assert failed(server, prompt) == (
        "regions",
        "model: got a model of class Flux; allowed: an Anima model (Load Diffusion Model with an Anima file)\n",
    )


def test_a_strength_that_is_no_number_is_said_at_its_region(server):
    prompt = workflow(server)
    prompt["left"]["inputs"]["strength"] = float("nan")  # ComfyUI's own check of the range lets it pass
    where, said = failed(server, prompt)
    assert where == "left" and "left: strength: got nan; allowed: a finite number >= 0" in said


def test_masks_of_another_shape_leave_the_picture_alone_and_say_so(server):
    prompt = workflow(server)
    for name in ("half", "black"):
        prompt[name]["inputs"].update(width=512, height=512)
    assert server.queue(prompt)["status"]["status_str"] == "success"
    assert "Anima Regions: not applied: the picture is 192 x 128 pixels (ratio 1.500), the masks'" in server.log()


REFUSED = {
    "strength too high": ("left", {"strength": 11.0}, "Value 11.0 bigger than max of 10.0", "strength"),
    "strength negative": ("left", {"strength": -0.5}, "Value -0.5 smaller than min of 0.0", "strength"),
    "priority too high": ("left", {"priority": 101}, "Value 101 bigger than max of 100", "priority"),
    "no mask": ("left", {"mask": None}, "Required input is missing", "mask"),
    "no conditioning": ("left", {"conditioning": None}, "Required input is missing", "conditioning"),
    "text as a mask": ("left", {"mask": ["one", 0]}, "Return type mismatch between linked nodes", "mask"),
    "no region": (
        "regions",
        {"regions.region0": None, "regions.region1": None},
        "Required input is missing",
        "region0",
    ),
    "a mask as a region": ("regions", {"regions.region0": ["half", 0]}, "Return type mismatch", "region0"),
    "global strength": ("regions", {"strength": 2.5}, "Value 2.5 bigger than max of 2.0", "strength"),
    "unknown mode": ("regions", {"mode": "harsh"}, "Value not in list", "mode: 'harsh' not in ['soft_log', 'hard']"),
    "text as a model": ("regions", {"model": ["one", 0]}, "Return type mismatch", "model"),
    "no base": ("regions", {"base": None}, "Required input is missing", "base"),
    "preview of nothing": (
        "preview",
        {"regions.region0": None, "regions.region1": None},
        "Required input is missing",
        "region0",
    ),
    "preview too small": ("preview", {"width": 8}, "Value 8 smaller than min of 16", "width"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_before_anything_runs(server, name):
    target, change, message, details = REFUSED[name]
    prompt = workflow(server)
    del prompt["save" if target == "preview" else "preview"]  # ComfyUI runs the outputs that are not concerned
    inputs = prompt[target]["inputs"]
    inputs.update(change)
    prompt[target]["inputs"] = {key: value for key, value in inputs.items() if value is not None}
    ((where, said, about),) = server.refused(prompt)
    assert where == target and message in said and details in about


def test_accelerate_without_a_model_is_refused(server):
    prompt = {"fast": node("AnimaFastAccelerate", debug=False)}
    links = {"model": ["fast", 0], "positive": ["base", 0], "negative": ["base", 0], "latent_image": ["latent", 0]}
    prompt["base"], prompt["latent"] = workflow(server)["base"], workflow(server)["latent"]
    prompt["sampler"] = node("KSampler", **{**workflow(server)["sampler"]["inputs"], **links})
    prompt["save"] = node("SaveLatent", samples=["sampler", 0], filename_prefix="none")
    assert server.refused(prompt) == [("fast", "Required input is missing", "model")]
