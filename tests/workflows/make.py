"""Writes this folder's workflows: right ones, and one for each fault, made from a few right parts.

    python tests/workflows/make.py

`expected.json` says what doctor must find in each: {file: {"faults": ids of errors and warnings, "notes": ids}}.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

HERE = Path(__file__).parent

MODEL, ENCODER, VAE = "anima-base-v1.0.safetensors", "qwen_3_06b_base.safetensors", "qwen_image_vae.safetensors"
NEGATIVE = "worst quality, low quality, score_1, score_2, score_3, blurry, jpeg artifacts, sepia"

#: What nodes give, for the user interface's form.
OUTPUTS = {
    "AnimaApplyRegionalAttentionHook": ("CONDITIONING", "CONDITIONING"),
    "AnimaBuildRegionalCrossAttnBias": ("REGIONAL_ATTN_BIAS_TEMPLATE",),
    "AnimaFastRegion": ("ANIMA_FAST_REGION",),
    "AnimaFastRegions": ("MODEL", "CONDITIONING", "CONDITIONING"),
    "AnimaMaskToTokenGrid": ("REGIONAL_TOKEN_WEIGHTS",),
    "AnimaRegionalConditioningConcat": ("CONDITIONING", "REGIONAL_RANGES"),
    "CLIPLoader": ("CLIP",),
    "CLIPTextEncode": ("CONDITIONING",),
    "EmptyLatentImage": ("LATENT",),
    "KSampler": ("LATENT",),
    "LoraLoaderModelOnly": ("MODEL",),
    "MaskComposite": ("MASK",),
    "ModelSamplingAuraFlow": ("MODEL",),
    "ModelSamplingDiscrete": ("MODEL",),
    "ModelSamplingSD3": ("MODEL",),
    "SolidMask": ("MASK",),
    "UNETLoader": ("MODEL",),
    "VAEDecode": ("IMAGE",),
    "VAELoader": ("VAE",),
}


def node(kind, **inputs):
    return {"class_type": kind, "inputs": inputs}


def plain(**sampler):
    """Text to image, as the official template."""
    return {
        "1": node("UNETLoader", unet_name=MODEL, weight_dtype="default"),
        "2": node("CLIPLoader", clip_name=ENCODER, type="stable_diffusion", device="default"),
        "3": node("VAELoader", vae_name=VAE),
        "4": node("CLIPTextEncode", clip=["2", 0], text="masterpiece, best quality, a lighthouse in the fog"),
        "5": node("CLIPTextEncode", clip=["2", 0], text=NEGATIVE),
        "6": node("EmptyLatentImage", width=1024, height=1024, batch_size=1),
        "7": ksampler(**sampler),
        "8": node("VAEDecode", samples=["7", 0], vae=["3", 0]),
        "9": node("SaveImage", images=["8", 0], filename_prefix="anima"),
    }


def ksampler(**changes):
    settings = {
        "model": ["1", 0],
        "positive": ["4", 0],
        "negative": ["5", 0],
        "latent_image": ["6", 0],
        "seed": 7,
        "steps": 30,
        "cfg": 4.0,
        "sampler_name": "er_sde",
        "scheduler": "simple",
        "denoise": 1.0,
    }
    return node("KSampler", **{**settings, **changes})


def halves(first=10):
    """Nodes of a left and a right mask; theirs are `first + 2` and `first + 3`."""
    black, white, left, right = (str(first + n) for n in range(4))
    place = {"destination": [black, 0], "source": [white, 0], "y": 0, "operation": "add"}
    return {
        black: node("SolidMask", value=0.0, width=1024, height=1024),
        white: node("SolidMask", value=1.0, width=512, height=1024),
        left: node("MaskComposite", **place, x=0),
        right: node("MaskComposite", **place, x=512),
    }


def seed():
    """The workflow of the report that doctor was made from: its files, its settings, its model without a patch."""
    return {
        "1": node("UNETLoader", unet_name="anima_diffusion.safetensors", weight_dtype="default"),
        "2": node("EmptyLatentImage", width=1024, height=1024, batch_size=1),
        "3": node("CLIPTextEncode", clip=["18", 0], text="studio lighting, photoreal, high detail"),
        "4": node("CLIPTextEncode", clip=["18", 0], text="red sports car"),
        "5": node("CLIPTextEncode", clip=["18", 0], text="blue owl"),
        "6": node("CLIPTextEncode", clip=["18", 0], text="blurry, low quality, artifact"),
        **halves(7),
        "11": node(
            "AnimaRegionalConditioningConcat",
            region_1=["4", 0],
            region_2=["5", 0],
            base=["3", 0],
            base_position="last",
        ),
        "12": node(
            "AnimaMaskToTokenGrid",
            model=["1", 0],
            latent=["2", 0],
            mask_1=["9", 0],
            mask_2=["10", 0],
            downscale_mode="area",
            normalize_overlaps=True,
        ),
        "13": node(
            "AnimaBuildRegionalCrossAttnBias",
            ranges=["11", 1],
            token_weights=["12", 0],
            mode="soft_log",
            eps=0.0001,
            hard_value=-80.0,
            base_always_allowed=True,
            unmasked_to_base=True,
        ),
        "14": node(
            "AnimaApplyRegionalAttentionHook",
            positive=["11", 0],
            negative=["6", 0],
            bias_template=["13", 0],
            model=["1", 0],
            apply_to_cross_attn_only=True,
            start_percent=0.35,
            end_percent=1.0,
            debug_shapes=False,
        ),
        "15": ksampler(
            positive=["14", 0],
            negative=["14", 1],
            latent_image=["2", 0],
            seed=1,
            steps=40,
            cfg=4.5,
            sampler_name="euler",
            scheduler="normal",
        ),
        "16": node("VAEDecode", samples=["15", 0], vae=["19", 0]),
        "17": node("SaveImage", images=["16", 0], filename_prefix="anima_regional_left_right"),
        "18": node("CLIPLoader", clip_name="anima_clip.safetensors", type="stable_diffusion"),
        "19": node("VAELoader", vae_name="anima_vae.safetensors"),
    }


def hook():
    """The seed's workflow as it should be: patched model everywhere, gentle bias, official sampler and files."""
    nodes = seed()
    nodes["20"] = node("ModelSamplingAuraFlow", model=["1", 0], shift=3.0)
    for name in ("12", "14", "15"):
        nodes[name]["inputs"]["model"] = ["20", 0]
    nodes["13"]["inputs"].update(eps=0.001, strength=0.35)
    nodes["14"]["inputs"]["attention_backend"] = "orig"
    nodes["15"]["inputs"]["sampler_name"] = "er_sde"
    nodes["1"]["inputs"]["unet_name"] = MODEL
    nodes["18"]["inputs"]["clip_name"] = ENCODER
    nodes["19"]["inputs"]["vae_name"] = VAE
    return nodes


def regions(**settings):
    """Two regions with the nodes of anima_fast."""
    nodes = plain()
    nodes |= halves(10)
    nodes["20"] = node("CLIPTextEncode", clip=["2", 0], text="a red sports car")
    nodes["21"] = node("CLIPTextEncode", clip=["2", 0], text="a blue owl")
    for name, prompt, mask, title in (("22", "20", "12", "left"), ("23", "21", "13", "right")):
        nodes[name] = node(
            "AnimaFastRegion", conditioning=[prompt, 0], mask=[mask, 0], strength=1.0, priority=0, name=title
        )
    whole = {
        "model": ["1", 0],
        "base": ["4", 0],
        "negative": ["5", 0],
        "regions.region0": ["22", 0],
        "regions.region1": ["23", 0],
        "combine": "logit",
        "mode": "soft_log",
        "strength": 0.35,
        "start_percent": 0.0,
        "end_percent": 1.0,
        "outside": "all",
        "base_always_allowed": True,
        "unmasked_to_base": True,
        "base_weight": 0.0,
        "normalize_overlaps": True,
        "eps": 0.0001,
        "hard_value": 0.0,
        "resample": "area",
        "pads": "fold",
        "blocks": "",
        "canvas_width": 0,
        "canvas_height": 0,
        "stretch_masks": False,
        "crop_top": 0.0,
        "crop_left": 0.0,
        "crop_bottom": 1.0,
        "crop_right": 1.0,
        "debug": False,
    }
    nodes["24"] = node("AnimaFastRegions", **{**whole, **settings})
    nodes["7"]["inputs"].update(model=["24", 0], positive=["24", 1], negative=["24", 2])
    return nodes


def advanced(guider_model="1"):
    """Sampled by SamplerCustomAdvanced, the scheduler's model being the loader's."""
    nodes = plain()
    nodes["7"] = node(
        "SamplerCustomAdvanced",
        noise=["10", 0],
        guider=["11", 0],
        sampler=["12", 0],
        sigmas=["13", 0],
        latent_image=["6", 0],
    )
    nodes["10"] = node("RandomNoise", noise_seed=7)
    nodes["11"] = node("CFGGuider", model=[guider_model, 0], positive=["4", 0], negative=["5", 0], cfg=4.0)
    nodes["12"] = node("KSamplerSelect", sampler_name="euler")
    nodes["13"] = node("BasicScheduler", model=["1", 0], scheduler="simple", steps=30, denoise=1.0)
    return nodes


def turbo(**sampler):
    nodes = plain(**{"steps": 8, "cfg": 1.0, "sampler_name": "euler", "model": ["10", 0], **sampler})
    nodes["10"] = node(
        "LoraLoaderModelOnly", model=["1", 0], lora_name="anima-turbo-lora-v0.2.safetensors", strength_model=1.0
    )
    return nodes


def hires(denoise=0.5, scale=1.5):
    nodes = plain()
    nodes["10"] = node("LatentUpscaleBy", samples=["7", 0], upscale_method="bislerp", scale_by=scale)
    nodes["11"] = ksampler(latent_image=["10", 0], denoise=denoise, steps=20)
    nodes["8"]["inputs"]["samples"] = ["11", 0]
    return nodes


def hires_with_hook():
    nodes = hook()
    nodes["30"] = node("LatentUpscaleBy", samples=["15", 0], upscale_method="bislerp", scale_by=1.5)
    nodes["31"] = copy.deepcopy(nodes["15"])
    nodes["31"]["inputs"].update(latent_image=["30", 0], denoise=0.5)
    nodes["16"]["inputs"]["samples"] = ["31", 0]
    return nodes


def hires_in_pixels():
    nodes = plain()
    nodes["10"] = node("ImageScaleBy", image=["8", 0], upscale_method="lanczos", scale_by=2.0)
    nodes["11"] = node("VAEEncode", pixels=["10", 0], vae=["3", 0])
    nodes["12"] = ksampler(latent_image=["11", 0], denoise=0.35, steps=20)
    nodes["13"] = node(
        "VAEDecodeTiled",
        samples=["12", 0],
        vae=["3", 0],
        tile_size=512,
        overlap=64,
        temporal_size=64,
        temporal_overlap=8,
    )
    nodes["9"]["inputs"]["images"] = ["13", 0]
    return nodes


def two_stages(**last):
    """One schedule in two samplers: the first hands its noise on."""
    nodes = plain()
    settings = {**nodes["7"]["inputs"]}
    settings["noise_seed"] = settings.pop("seed")
    settings.pop("denoise")
    first = {"add_noise": "enable", "start_at_step": 0, "end_at_step": 15, "return_with_leftover_noise": "enable"}
    second = {
        "add_noise": "disable",
        "start_at_step": 15,
        "end_at_step": 10000,
        "return_with_leftover_noise": "disable",
    }
    nodes["7"] = node("KSamplerAdvanced", **settings, **first)
    nodes["10"] = node("KSamplerAdvanced", **{**settings, "latent_image": ["7", 0]}, **{**second, **last})
    nodes["8"]["inputs"]["samples"] = ["10", 0]
    return nodes


def image_to_image():
    nodes = plain(denoise=0.55)
    nodes["10"] = node("LoadImage", image="photo.png")
    nodes["11"] = node(
        "ImageScaleToTotalPixels", image=["10", 0], upscale_method="lanczos", megapixels=1.0, resolution_steps=1
    )
    nodes["6"] = node("VAEEncode", pixels=["11", 0], vae=["3", 0])
    return nodes


def upscaled_in_tiles(nodes=None, **changes):
    nodes = copy.deepcopy(nodes) if nodes else plain()
    sampler = nodes.get("7") if nodes.get("7", {}).get("class_type") == "KSampler" else nodes["15"]
    links = {name: sampler["inputs"][name] for name in ("model", "positive", "negative")}
    decoded = next(name for name, entry in nodes.items() if entry["class_type"] == "VAEDecode")
    save = next(entry for entry in nodes.values() if entry["class_type"] == "SaveImage")
    nodes["30"] = node("UpscaleModelLoader", model_name="4x_upscaler.safetensors")
    nodes["31"] = node(
        "UltimateSDUpscale",
        image=[decoded, 0],
        **links,
        vae=nodes[decoded]["inputs"]["vae"],
        upscale_model=["30", 0],
        upscale_by=2.0,
        seed=7,
        steps=20,
        cfg=4.0,
        sampler_name="euler",
        scheduler="simple",
        denoise=0.25,
        **{"tile_width": 1024, "tile_height": 1024, **changes},
    )
    save["inputs"]["images"] = ["31", 0]
    return nodes


def control():
    nodes = regions()
    nodes["30"] = node("ModelPatchLoader", name="anima-lllite-depth-1.safetensors")
    nodes["31"] = node("LoadImage", image="depth.png")
    nodes["32"] = node(
        "AnimaLLLiteApply",
        model=["1", 0],
        model_patch=["30", 0],
        image=["31", 0],
        strength=1.0,
        start_percent=0.0,
        end_percent=1.0,
    )
    nodes["24"]["inputs"]["model"] = ["32", 0]
    return nodes


def sized(width, height, nodes=None):
    nodes = nodes or plain()
    latent = next(entry for entry in nodes.values() if entry["class_type"] == "EmptyLatentImage")
    latent["inputs"].update(width=width, height=height)
    return nodes


def changed(nodes, name, **inputs):
    nodes[name]["inputs"].update(inputs)
    return nodes


def without(nodes, name, *inputs):
    for key in inputs:
        del nodes[name]["inputs"][key]
    return nodes


def patched(kind, nodes=None, **inputs):
    """A patch of the model between the loader and the sampler."""
    nodes = nodes or plain()
    nodes["40"] = node(kind, model=["1", 0], **inputs)
    nodes["7"]["inputs"]["model"] = ["40", 0]
    return nodes


def small_mask(nodes, width, height, at):
    """The left region's mask becomes a rectangle."""
    nodes["41"] = node("SolidMask", value=1.0, width=width, height=height)
    nodes["42"] = node("MaskComposite", destination=["10", 0], source=["41", 0], x=at[0], y=at[1], operation="add")
    nodes["22"]["inputs"]["mask"] = ["42", 0]
    return nodes


def backend_over_hook():
    nodes = hook()
    nodes["40"] = node("ModelAttentionBackend", model=["20", 0], attention="pytorch attention")
    for name in ("12", "14", "15"):
        nodes[name]["inputs"]["model"] = ["40", 0]
    return nodes


def two_hooks():
    nodes = hook()
    nodes["40"] = copy.deepcopy(nodes["14"])
    nodes["40"]["inputs"].update(positive=["14", 0], negative=["14", 1])
    nodes["15"]["inputs"].update(positive=["40", 0], negative=["40", 1])
    return nodes


def two_backends():
    nodes = patched("ModelAttentionBackend", attention="pytorch attention")
    nodes["41"] = node("PathchSageAttentionKJ", model=["40", 0], sage_attention="auto", allow_compile=False)
    nodes["7"]["inputs"]["model"] = ["41", 0]
    return nodes


def window_of_another_schedule():
    nodes = hook()
    nodes["40"] = node("ModelSamplingAuraFlow", model=["1", 0], shift=6.0)
    nodes["14"]["inputs"]["model"] = ["40", 0]
    return nodes


def another_checkpoint():
    nodes = hook()
    nodes["40"] = node("UNETLoader", unet_name="anima-preview3-base.safetensors", weight_dtype="default")
    for name in ("12", "14"):
        nodes[name]["inputs"]["model"] = ["40", 0]
    return nodes


def two_encoders():
    nodes = regions()
    nodes["40"] = node("CLIPLoader", clip_name="qwen_3_06b_anima_tuned.safetensors", type="stable_diffusion")
    nodes["20"]["inputs"]["clip"] = ["40", 0]
    # Regions reach the sampler through the model, which is not looked at for prompts: the base prompt does.
    nodes["4"]["inputs"]["clip"] = ["40", 0]
    return nodes


def in_a_circle():
    nodes = plain()
    nodes["6"] = node("LatentUpscaleBy", samples=["7", 0], upscale_method="bislerp", scale_by=1.0)
    return nodes


def switched(on=False):
    """Turbo behind a switch, as in the official templates, in API form."""
    nodes = turbo()
    nodes["20"] = node("PrimitiveBoolean", value=on)
    for name, default, fast in (("21", 30, 8), ("22", 4.0, 1.0)):
        number = int(name)
        kind = "PrimitiveInt" if isinstance(default, int) else "PrimitiveFloat"
        nodes[str(number + 10)], nodes[str(number + 20)] = node(kind, value=default), node(kind, value=fast)
        nodes[name] = node(
            "ComfySwitchNode", on_false=[str(number + 10), 0], on_true=[str(number + 20), 0], switch=["20", 0]
        )
    nodes["23"] = node("ComfySwitchNode", on_false=["1", 0], on_true=["10", 0], switch=["20", 0])
    nodes["7"]["inputs"].update(model=["23", 0], steps=["21", 0], cfg=["22", 0])
    return nodes


def to_ui(nodes):
    """The user interface's form of a prompt: numbered links, widget values in their order, a seed's control."""
    from anima_fast.doctor.node_types import WIDGETS

    links, out = [], {}
    for name, entry in nodes.items():
        kind = entry["class_type"]
        out[name] = {
            "id": int(name),
            "type": kind,
            "pos": [60 + 300 * (len(out) % 6), 60 + 320 * (len(out) // 6)],
            "size": [270, 200],
            "flags": {},
            "order": len(out),
            "mode": 0,
            "inputs": [],
            "outputs": [{"name": t, "type": t, "links": []} for t in OUTPUTS.get(kind, ())],
            "properties": {"Node name for S&R": kind},
            "widgets_values": [],
        }
        for widget in WIDGETS[kind]:
            if widget in entry["inputs"] and not isinstance(entry["inputs"][widget], list):
                out[name]["widgets_values"].append(entry["inputs"][widget])
                if widget in ("seed", "noise_seed"):
                    out[name]["widgets_values"].append("fixed")
    for name, entry in nodes.items():
        for key, value in entry["inputs"].items():
            if isinstance(value, list):
                origin = out[value[0]]["outputs"][value[1]]
                origin["links"].append(len(links) + 1)
                out[name]["inputs"].append({"name": key, "type": origin["type"], "link": len(links) + 1})
                links.append(
                    [len(links) + 1, int(value[0]), value[1], int(name), len(out[name]["inputs"]) - 1, origin["type"]]
                )
    return {
        "last_node_id": max(map(int, nodes)),
        "last_link_id": len(links),
        "nodes": list(out.values()),
        "links": links,
        "groups": [],
        "config": {},
        "extra": {},
        "version": 0.4,
    }


def _ui_node(number, kind, values=(), inputs=(), outputs=(), mode=0, **more):
    return {
        "id": number,
        "type": kind,
        "pos": [0, 0],
        "size": [200, 100],
        "mode": mode,
        "inputs": [
            {"name": name, "type": t, "link": link, **({"widget": {"name": name}} if widget else {})}
            for name, t, link, widget in inputs
        ],
        "outputs": [{"name": t, "type": t, "links": list(links)} for t, links in outputs],
        "properties": {},
        "widgets_values": list(values),
        **more,
    }


def virtual_nodes(cfg=4.0):
    """What the user interface resolves: reroutes, Get and Set, a primitive, a bypassed LoRA, a muted preview."""
    m, c, lat = "MODEL", "CONDITIONING", "LATENT"
    nodes = [
        _ui_node(1, "UNETLoader", [MODEL, "default"], outputs=[(m, [1])]),
        _ui_node(2, "CLIPLoader", [ENCODER, "stable_diffusion", "default"], outputs=[("CLIP", [2, 3])]),
        _ui_node(3, "VAELoader", [VAE], outputs=[("VAE", [4])]),
        _ui_node(4, "CLIPTextEncode", ["a lighthouse"], [("clip", "CLIP", 2, False)], [(c, [5])]),
        _ui_node(5, "CLIPTextEncode", [NEGATIVE], [("clip", "CLIP", 3, False)], [(c, [6])]),
        _ui_node(6, "EmptyLatentImage", [832, 1216, 1], outputs=[(lat, [7])]),
        _ui_node(10, "Reroute", [], [("", "*", 1, False)], [(m, [8])]),
        _ui_node(
            11,
            "LoraLoaderModelOnly",
            ["anima-turbo-lora-v0.2.safetensors", 1.0],
            [("model", m, 8, False)],
            [(m, [9])],
            mode=4,
        ),
        _ui_node(12, "SetNode", ["the model"], [(m, m, 9, False)], [("*", [])]),
        _ui_node(13, "GetNode", ["the model"], [], [(m, [10])]),
        _ui_node(14, "PrimitiveNode", [cfg, "fixed"], [], [("FLOAT", [11])]),
        _ui_node(
            7,
            "KSampler",
            [7, "randomize", 30, 8.0, "er_sde", "simple", 1.0],
            [
                ("model", m, 10, False),
                ("positive", c, 5, False),
                ("negative", c, 6, False),
                ("latent_image", lat, 7, False),
                ("cfg", "FLOAT", 11, True),
            ],
            [(lat, [12])],
        ),
        _ui_node(8, "VAEDecode", [], [("samples", lat, 12, False), ("vae", "VAE", 4, False)], [("IMAGE", [13, 14])]),
        _ui_node(9, "SaveImage", ["anima"], [("images", "IMAGE", 13, False)]),
        _ui_node(15, "PreviewImage", [], [("images", "IMAGE", 14, False)], mode=2),
        {"id": 16, "type": "Note", "pos": [0, 0], "size": [200, 80], "mode": 0, "widgets_values": ["read me"]},
    ]
    ends = [(1, 10), (2, 4), (2, 5), (3, 8), (4, 7), (5, 7), (6, 7), (10, 11), (11, 12), (13, 7), (14, 7), (7, 8)]
    ends += [(8, 9), (8, 15)]
    links = [[number, a, 0, b, 0, "*"] for number, (a, b) in enumerate(ends, 1)]
    return {"last_node_id": 16, "last_link_id": len(links), "nodes": nodes, "links": links, "version": 0.4}


def nested_subgraphs(cfg=4.0):
    """A sampler in a subgraph in a subgraph; its CFG is promoted twice and set on the outermost node."""
    m, c, lat = "MODEL", "CONDITIONING", "LATENT"
    names = [("model", m), ("positive", c), ("negative", c), ("latent_image", lat), ("cfg", "FLOAT")]

    def link(number, origin, slot, target, to, kind):
        return {
            "id": number,
            "origin_id": origin,
            "origin_slot": slot,
            "target_id": target,
            "target_slot": to,
            "type": kind,
        }

    def definition(identifier, inner):
        return {
            "id": identifier,
            "name": identifier,
            "inputNode": {"id": -10},
            "outputNode": {"id": -20},
            "inputs": [{"name": n, "type": t, "linkIds": [i + 1]} for i, (n, t) in enumerate(names)],
            "outputs": [{"name": "LATENT", "type": lat, "linkIds": [9]}],
            "nodes": [inner],
            "links": [
                *(link(i + 1, -10, i, inner["id"], i, t) for i, (_, t) in enumerate(names)),
                link(9, inner["id"], 0, -20, 0, lat),
            ],
        }

    entries = [(n, t, i + 1, n == "cfg") for i, (n, t) in enumerate(names)]
    sampler = _ui_node(3, "KSampler", [7, "fixed", 30, 9.0, "euler", "simple", 1.0], entries, [(lat, [9])])
    middle = _ui_node(5, "inner", [], entries, [(lat, [9])])
    host = _ui_node(
        20,
        "outer",
        [cfg],
        [(n, t, number, n == "cfg") for (n, t), number in zip(names, (1, 5, 6, 7, None), strict=True)],
        [(lat, [12])],
    )
    base = virtual_nodes()
    kept = [entry for entry in base["nodes"] if entry["id"] in (1, 2, 3, 4, 5, 6, 8, 9)]
    links = [entry for entry in base["links"] if entry[0] in (1, 2, 3, 4, 5, 6, 7, 12, 13)]
    for entry in links:
        entry[1] = 20 if entry[1] == 7 else entry[1]
        entry[3] = 20 if entry[3] in (7, 10) else entry[3]
    return {
        "last_node_id": 20,
        "last_link_id": 13,
        "nodes": [*kept, host],
        "links": links,
        "definitions": {"subgraphs": [definition("outer", middle), definition("inner", sampler)]},
        "version": 0.4,
    }


def files(name, **names):
    """Loaders with other files: unet_name, clip_name, vae_name."""
    nodes = plain()
    owners = {"unet_name": "1", "clip_name": "2", "vae_name": "3"}
    for key, value in names.items():
        nodes[owners[key]]["inputs"][key] = value
    return nodes


#: name: (workflow, ids of errors and warnings, ids of notes)
WORKFLOWS = {
    # right
    "right_plain": (plain(), [], []),
    "right_euler_beta_832x1216": (sized(832, 1216, plain(sampler_name="euler", scheduler="beta")), [], []),
    "right_seed_fixed": (hook(), [], []),
    "right_seed_fixed_ui": (to_ui(hook()), [], []),
    "right_seed_unpatched": (
        changed(changed(changed(hook(), "12", model=["1", 0]), "14", model=["1", 0]), "15", model=["1", 0]),
        [],
        ["sampling-shift-built-in"],
    ),
    "right_seed_hard": (changed(hook(), "13", mode="hard"), [], ["bias-strength"]),
    "right_regions_put_aside": (
        changed(regions(), "7", model=["1", 0], positive=["4", 0], negative=["5", 0]),
        [],
        ["regions-unused"],
    ),
    "right_regions": (regions(), [], []),
    "right_regions_ui": (to_ui(regions()), [], []),
    "right_regions_hard": (regions(mode="hard"), [], []),
    "right_regions_blend": (regions(combine="blend", strength=1.0), [], []),
    "right_regions_with_attention_backend": (
        changed(patched("ModelAttentionBackend", regions(), attention="sage"), "40", model=["24", 0]),
        [],
        [],
    ),
    "right_regions_with_control": (control(), [], []),
    "right_shift_node": (patched("ModelSamplingAuraFlow", shift=3.0), [], []),
    "right_flux_shift_node": (
        patched("ModelSamplingFlux", max_shift=1.15, base_shift=0.5, width=1024, height=1024),
        [],
        [],
    ),
    "right_turbo": (turbo(), [], []),
    "right_turbo_switched_off": (switched(False), [], []),
    "right_turbo_switched_on": (switched(True), [], []),
    "right_hires": (hires(), [], []),
    "right_hires_in_pixels": (hires_in_pixels(), [], []),
    "right_two_stages": (two_stages(), [], []),
    "right_custom_sampler": (advanced(), [], []),
    "right_image_to_image": (image_to_image(), [], []),
    "right_upscaled_in_tiles": (upscaled_in_tiles(), [], []),
    "right_preview_checkpoint": (files("", unet_name="anima-preview3-base.safetensors"), [], []),
    "right_virtual_nodes_ui": (virtual_nodes(), [], []),
    "right_nested_subgraphs_ui": (nested_subgraphs(), [], []),
    "right_another_model": (
        files("", unet_name="sd_xl_base_1.0.safetensors", clip_name="clip_l.safetensors"),
        [],
        ["not-anima"],
    ),
    # the seed's own
    "seed": (seed(), ["bias-strength"], ["files-renamed", "sampling-shift-built-in"]),
    # the graph
    "fault_circle": (in_a_circle(), ["cycle"], []),
    "fault_dangling_link": (changed(plain(), "8", vae=["99", 0]), ["dangling-link"], []),
    "fault_missing_input": (without(plain(), "7", "negative"), ["missing-input"], []),
    "fault_no_output": ({k: v for k, v in plain().items() if k != "9"}, ["no-output"], []),
    # files
    "fault_checkpoint": (files("", unet_name="cosmos_predict2_2B_t2i.safetensors"), ["checkpoint-mismatch"], []),
    "fault_text_encoder": (files("", clip_name="t5xxl_fp16.safetensors"), ["text-encoder-mismatch"], []),
    "fault_two_text_encoders": (two_encoders(), ["text-encoders-differ"], []),
    "fault_vae": (files("", vae_name="ae.safetensors"), ["vae-mismatch"], []),
    "fault_vae_sdxl": (files("", vae_name="sdxl_vae.safetensors"), ["vae-mismatch"], []),
    # the model's way
    "fault_timestep_scale": (patched("ModelSamplingSD3", shift=3.0), ["timestep-scale"], []),
    "fault_timestep_scale_ui": (to_ui(patched("ModelSamplingSD3", shift=3.0)), ["timestep-scale"], []),
    "fault_sampling_type": (
        patched("ModelSamplingDiscrete", sampling="v_prediction", zsnr=False),
        ["sampling-type"],
        [],
    ),
    "fault_sampling_type_ui": (
        to_ui(patched("ModelSamplingDiscrete", sampling="eps", zsnr=False)),
        ["sampling-type"],
        [],
    ),
    "fault_shift": (patched("ModelSamplingAuraFlow", shift=1.0), ["sampling-shift"], []),
    "fault_shift_ui": (to_ui(patched("ModelSamplingAuraFlow", shift=1.73)), ["sampling-shift"], []),
    "fault_scheduler_model": (
        changed(patched("ModelSamplingAuraFlow", advanced("40"), shift=6.0), "7", model=["1", 0]),
        ["sampling-shift", "scheduler-model"],
        [],
    ),
    "fault_regional_model_schedule": (window_of_another_schedule(), ["regional-model"], []),
    "fault_regional_model_schedule_ui": (to_ui(window_of_another_schedule()), ["regional-model"], []),
    "fault_regional_model_checkpoint": (another_checkpoint(), ["regional-model", "regional-model"], []),
    "fault_override_by_backend": (backend_over_hook(), ["override-conflict"], []),
    "fault_override_by_two_hooks": (two_hooks(), ["override-conflict"], []),
    "fault_override_by_two_backends": (two_backends(), ["override-conflict"], []),
    "fault_regions_unused": (changed(regions(), "7", model=["1", 0]), ["regions-unused"], []),
    # settings
    "fault_steps": (plain(steps=12), ["steps"], []),
    "fault_steps_turbo": (turbo(steps=30), ["steps"], []),
    "fault_cfg_high": (plain(cfg=12.0), ["cfg"], []),
    "fault_cfg_low": (plain(cfg=1.0), ["cfg"], []),
    "fault_cfg_turbo": (turbo(cfg=4.0), ["cfg"], []),
    "fault_cfg_behind_primitive_ui": (virtual_nodes(cfg=11.0), ["cfg"], []),
    "fault_cfg_in_subgraphs_ui": (nested_subgraphs(cfg=11.0), ["cfg"], []),
    "fault_sampler": (plain(sampler_name="ddpm"), ["sampler"], []),
    "fault_scheduler": (plain(scheduler="karras"), ["scheduler"], []),
    "fault_denoise_empty": (plain(denoise=0.6), ["denoise"], []),
    "fault_denoise_hires": (hires(denoise=0.9, scale=2.0), ["denoise"], []),
    "fault_leftover_noise": (
        two_stages(end_at_step=22, return_with_leftover_noise="enable"),
        ["noise"],
        [],
    ),
    "fault_no_noise": (
        changed(two_stages(), "7", add_noise="disable"),
        ["noise"],
        [],
    ),
    "fault_size_hook": (sized(1000, 1000, hook()), ["size-multiple"], []),
    "fault_size_half_token": (sized(1024, 1016), ["size-multiple"], []),
    "fault_size_preview": (
        sized(2048, 2048, files("", unet_name="anima-preview3-base.safetensors")),
        ["size"],
        [],
    ),
    "fault_size": (sized(2560, 1536), ["size"], []),
    # regions
    "fault_bias_strength": (changed(hook(), "13", strength=1.5), ["bias-strength"], []),
    "fault_bias_off": (changed(hook(), "13", strength=0.0), ["bias-strength"], []),
    "fault_bias_eps": (changed(hook(), "13", eps=1e-8), ["bias-eps"], []),
    "fault_bias_eps_ui": (to_ui(changed(hook(), "13", eps=0.2)), ["bias-eps"], []),
    "fault_window_early": (
        changed(changed(hook(), "14", start_percent=0.0), "13", strength=1.0),
        ["bias-window"],
        ["bias-strength"],
    ),
    "fault_window_late": (changed(hook(), "14", start_percent=0.9), ["bias-window"], []),
    "fault_window_empty": (changed(hook(), "14", start_percent=0.8, end_percent=0.4), ["bias-window"], []),
    "fault_self_attention": (changed(hook(), "14", apply_to_cross_attn_only=False), ["bias-on-self-attention"], []),
    "fault_unpaired": (without(hook(), "11", "region_2"), ["region-unpaired"], []),
    "fault_masks_overlap": (
        changed(changed(hook(), "12", normalize_overlaps=False), "10", x=256),
        ["masks-overlap"],
        ["masks-hole"],
    ),
    "fault_masks_hole": (
        changed(changed(regions(base_always_allowed=False, unmasked_to_base=False), "13", x=768), "13", y=0),
        ["masks-hole"],
        [],
    ),
    "fault_mask_vanishes": (small_mask(regions(), 6, 6, (333, 333)), ["mask-vanishes"], ["masks-hole"]),
    "fault_mask_shape": (sized(832, 1216, regions()), ["mask-shape"], []),
    "fault_regional_grid": (hires_with_hook(), ["regional-grid"], []),
    "fault_tiling_hook": (upscaled_in_tiles(hook()), ["tiling"], []),
    "fault_tiling": (upscaled_in_tiles(regions()), ["tiling"], []),
}


def written():
    """File name -> its text."""
    texts = {f"{name}.json": json.dumps(nodes, indent=1) + "\n" for name, (nodes, _, _) in WORKFLOWS.items()}
    expected = {f"{name}.json": {"faults": faults, "notes": notes} for name, (_, faults, notes) in WORKFLOWS.items()}
    lines = ",\n".join(f" {json.dumps(name)}: {json.dumps(entry)}" for name, entry in expected.items())
    texts["expected.json"] = f"{{\n{lines}\n}}\n"
    return texts


if __name__ == "__main__":
    for name, text in written().items():
        (HERE / name).write_text(text)
    print(f"{len(WORKFLOWS)} workflows")
