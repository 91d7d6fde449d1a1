"""The ComfyUI nodes (V3). Importing this imports ComfyUI; `comfy_entrypoint` is what it looks for."""

from __future__ import annotations

import os
from typing import Any

import torch
from comfyui_version import __version__ as comfyui_version

from ...encoder.adjust import ADVICE
from ...encoder.files import HEAD_NORMS, RECURRENCES
from ...errors import invalid
from .patching import accelerate, apply_regions, parse_blocks, require_comfyui
from .preview import preview
from .regions import Region, Settings

require_comfyui(comfyui_version)

import folder_paths  # noqa: E402
from comfy_api.latest import ComfyExtension, io, ui  # noqa: E402

__all__ = ["comfy_entrypoint"]

CATEGORY = "conditioning/anima"

_NO_FILE = "none"
_FILE_INPUTS = ("clip_name", "alignment_file", "calibration_file")

RegionType = io.Custom("ANIMA_FAST_REGION")


def _regions_input() -> io.Autogrow.Input:
    template = io.Autogrow.TemplatePrefix(
        RegionType.Input("region", tooltip="From an Anima Region node."), prefix="region", min=1, max=64
    )
    return io.Autogrow.Input("regions", template=template, tooltip="Any number of Anima Region nodes.")


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def _named(regions: dict[str, Region | None]) -> list[Region]:
    return [region for region in regions.values() if region is not None]


class AnimaFastRegion(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AnimaFastRegion",
            display_name="Anima Region",
            category=CATEGORY,
            description="One prompt and where in the picture it counts. Connect it to Anima Regions.",
            search_aliases=["regional prompt", "attention couple", "regional conditioning"],
            inputs=[
                io.Conditioning.Input("conditioning", tooltip="The region's prompt, from CLIP Text Encode."),
                io.Mask.Input("mask", tooltip="Where it counts: white yes, black no, grey in part. Any size."),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=10.0,
                    step=0.05,
                    tooltip="Multiplies the strength of Anima Regions for this region. 0: no limit to its place.",
                ),
                io.Int.Input(
                    "priority",
                    default=0,
                    min=-100,
                    max=100,
                    tooltip="Where regions overlap, a higher priority takes the place; equal ones share it.",
                ),
                io.String.Input("name", default="region", tooltip="What messages and the preview call it."),
            ],
            outputs=[RegionType.Output(display_name="region")],
        )

    @classmethod
    def execute(cls, conditioning: Any, mask: Any, strength: float, priority: int, name: str) -> io.NodeOutput:
        return io.NodeOutput(Region.make(conditioning, mask, strength, priority, name.strip() or "region"))


class AnimaFastRegions(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AnimaFastRegions",
            display_name="Anima Regions",
            category=CATEGORY,
            description="Different prompts in different places of a picture, in one fused cross-attention. Connect the "
            "model and both conditionings to any sampler.",
            search_aliases=["regional prompt", "attention couple", "regional conditioning"],
            inputs=[
                io.Model.Input("model", tooltip="An Anima model, with or without LoRA and control."),
                io.Conditioning.Input("base", tooltip="The prompt of the whole picture; it becomes positive."),
                io.Conditioning.Input("negative", tooltip="Passed through; it is never regional."),
                _regions_input(),
                io.Combo.Input(
                    "combine",
                    options=["logit", "blend"],
                    default="logit",
                    tooltip="logit: one attention over all prompts, each biased by its mask. blend: one "
                    "attention a prompt, mixed by the masks, as Attention Couple does.",
                ),
                io.Combo.Input(
                    "mode",
                    options=["soft_log", "hard"],
                    default="soft_log",
                    tooltip="soft_log: bias = strength x log(weight). hard: a prompt counts where its weight is above "
                    "one half and nowhere else.",
                ),
                io.Float.Input(
                    "strength",
                    default=0.35,
                    min=0.0,
                    max=2.0,
                    step=0.01,
                    tooltip="logit: how strictly prompts keep to their masks; 0 not at all, 0.2 to 0.5 usual. blend "
                    "has no use for it: there each region's own strength is its share, and the base prompt gets the "
                    "rest.",
                ),
                io.Float.Input(
                    "start_percent",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="When regions begin to count, as a share of the sampling (0: from the first step).",
                ),
                io.Float.Input(
                    "end_percent",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="When they cease to (1: never).",
                ),
                io.Combo.Input(
                    "outside",
                    options=["all", "base"],
                    default="all",
                    advanced=True,
                    tooltip="Outside that window, and in blocks not listed: all prompts count everywhere, or the base "
                    "prompt alone.",
                ),
                io.Boolean.Input(
                    "base_always_allowed",
                    default=True,
                    advanced=True,
                    tooltip="logit: the base prompt counts everywhere.",
                ),
                io.Boolean.Input(
                    "unmasked_to_base",
                    default=True,
                    advanced=True,
                    tooltip="logit: else, it counts where no region does.",
                ),
                io.Float.Input(
                    "base_weight",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    advanced=True,
                    tooltip="blend: the base prompt's least share.",
                ),
                io.Boolean.Input(
                    "normalize_overlaps",
                    default=True,
                    advanced=True,
                    tooltip="Where regions overlap, scale their weights to a sum of at most 1.",
                ),
                io.Float.Input(
                    "eps",
                    default=1e-4,
                    min=1e-8,
                    max=1.0,
                    step=1e-4,
                    round=False,
                    advanced=True,
                    tooltip="soft_log: the least weight, so that the logarithm is finite.",
                ),
                io.Float.Input(
                    "hard_value",
                    default=0.0,
                    min=-200.0,
                    max=0.0,
                    step=1.0,
                    advanced=True,
                    tooltip="hard: the bias outside a region. 0: excluded altogether, which is also the fastest.",
                ),
                io.Combo.Input(
                    "resample",
                    options=["area", "bilinear", "nearest", "max"],
                    default="area",
                    advanced=True,
                    tooltip="How masks become weights of 16 x 16 pixel tokens.",
                ),
                io.Combo.Input(
                    "pads",
                    options=["fold", "strip"],
                    default="fold",
                    advanced=True,
                    tooltip="fold: every prompt keeps its padding, as in the plain model. strip: leave it out, which "
                    "changes the picture.",
                ),
                io.String.Input(
                    "blocks",
                    default="",
                    advanced=True,
                    tooltip="Transformer blocks that see regions, such as 0-13, 20. Empty: all.",
                ),
                io.Int.Input(
                    "canvas_width",
                    default=0,
                    min=0,
                    max=65536,
                    advanced=True,
                    tooltip="With canvas_height: the picture's shape that the masks are for. 0: the masks' own shape.",
                ),
                io.Int.Input("canvas_height", default=0, min=0, max=65536, advanced=True, tooltip="See canvas_width."),
                io.Boolean.Input(
                    "stretch_masks",
                    default=False,
                    advanced=True,
                    tooltip="Serve pictures of another shape too, stretching masks. Off: those are left alone, with a "
                    "warning, since such a picture is often a tile.",
                ),
                *(
                    io.Float.Input(
                        f"crop_{side}",
                        default=default,
                        min=0.0,
                        max=1.0,
                        step=0.001,
                        advanced=True,
                        tooltip="The part of the canvas that is sampled, as fractions: for tiles.",
                    )
                    for side, default in (("top", 0.0), ("left", 0.0), ("bottom", 1.0), ("right", 1.0))
                ),
                io.Boolean.Input(
                    "debug",
                    default=False,
                    advanced=True,
                    tooltip="Log each block's first call: shapes, grid, prompts' rows and pads, bias, NaN and inf.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model"),
                io.Conditioning.Output(display_name="positive"),
                io.Conditioning.Output(display_name="negative"),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        base: Any,
        negative: Any,
        regions: dict[str, Region | None],
        blocks: str,
        combine: str,
        strength: float,
        hard_value: float,
        canvas_width: int,
        canvas_height: int,
        stretch_masks: bool,
        crop_top: float,
        crop_left: float,
        crop_bottom: float,
        crop_right: float,
        **settings: Any,
    ) -> io.NodeOutput:
        whole = Settings(
            blocks=parse_blocks(blocks),
            combine=combine,
            strength=1.0 if combine == "blend" else strength,
            hard_value=hard_value or None,
            canvas=(canvas_width, canvas_height) if canvas_width or canvas_height else None,
            stretch=stretch_masks,
            crop=(crop_top, crop_left, crop_bottom, crop_right),
            **settings,
        )
        return io.NodeOutput(apply_regions(model, _named(regions), whole), base, negative)


class AnimaFastAccelerate(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AnimaFastAccelerate",
            display_name="Anima Accelerate",
            category="model_patches/anima",
            description="The same picture, faster: each prompt's padding is folded into one number. Not needed after "
            "Anima Regions, which does it too.",
            search_aliases=["speed up", "padding", "cross attention"],
            inputs=[
                io.Model.Input("model", tooltip="An Anima model."),
                io.Boolean.Input("debug", default=False, advanced=True, tooltip="Log each block's first call."),
            ],
            outputs=[io.Model.Output(display_name="model")],
        )

    @classmethod
    def execute(cls, model: Any, debug: bool) -> io.NodeOutput:
        return io.NodeOutput(accelerate(model, debug))


class AnimaFastRegionPreview(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AnimaFastRegionPreview",
            display_name="Anima Region Preview",
            category=CATEGORY,
            description="The regions as the model sees them: its grid of 16 x 16 pixel tokens, each region's weights, "
            "overlaps and what no region covers.",
            inputs=[
                _regions_input(),
                io.Int.Input("width", default=1024, min=16, max=16384, step=8, tooltip="Of the picture, in pixels."),
                io.Int.Input("height", default=1024, min=16, max=16384, step=8, tooltip="Of the picture, in pixels."),
                io.Boolean.Input("normalize_overlaps", default=True, tooltip="As in Anima Regions."),
                io.Combo.Input(
                    "resample",
                    options=["area", "bilinear", "nearest", "max"],
                    default="area",
                    tooltip="As in Anima Regions.",
                ),
            ],
            outputs=[io.Image.Output(display_name="grid"), io.Image.Output(display_name="weights")],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls, regions: dict[str, Region | None], width: int, height: int, normalize_overlaps: bool, resample: str
    ) -> io.NodeOutput:
        settings = Settings(normalize_overlaps=normalize_overlaps, resample=resample)
        grid, weights = preview(_named(regions), settings, width, height)
        return io.NodeOutput(grid, weights, ui=ui.PreviewImage(grid, cls=cls))


class AnimaFastLoadQwen35CLIP(io.ComfyNode):
    """Files are looked for among ComfyUI's text encoders; what each setting does is said by `encoder.adjust.ADVICE`."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        files = folder_paths.get_filename_list("text_encoders")
        return io.Schema(
            node_id="AnimaFastLoadQwen35CLIP",
            display_name="Load Qwen3.5 CLIP (Anima)",
            category="loaders/anima",
            description="The hybrid text encoder for Anima (Qwen3.5-4B with a head). Start with everything off; then "
            "alignment at strength 0.5; calibration last.",
            search_aliases=["qwen35", "qwen3.5", "text encoder", "mamba2", "gated delta net"],
            inputs=[
                io.Combo.Input("clip_name", options=files, tooltip="The encoder, from models/text_encoders."),
                io.Combo.Input(
                    "recurrence",
                    options=list(RECURRENCES),
                    default="gdn",
                    tooltip="gdn: the layers as the model has them. mamba2: as the first node for this encoder read "
                    "them, for alignment and calibration files that were made with it.",
                ),
                io.Boolean.Input("use_alignment", default=False, tooltip=_sentence(ADVICE["alignment"])),
                io.Float.Input(
                    "alignment_strength",
                    default=0.5,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip=_sentence(ADVICE["alignment_strength"]),
                ),
                io.Boolean.Input("use_calibration", default=False, tooltip=_sentence(ADVICE["calibration"])),
                io.Float.Input(
                    "output_scale",
                    default=1.0,
                    min=0.0,
                    max=100.0,
                    step=0.05,
                    tooltip=_sentence(ADVICE["output_scale"]),
                ),
                io.Combo.Input(
                    "alignment_file",
                    options=[_NO_FILE, *files],
                    default=_NO_FILE,
                    tooltip="For use_alignment: from models/text_encoders, as anima-fast encoder fit-alignment "
                    "wrote it.",
                ),
                io.Combo.Input(
                    "calibration_file",
                    options=[_NO_FILE, *files],
                    default=_NO_FILE,
                    tooltip="For use_calibration: from models/text_encoders, as anima-fast encoder fit-calibration "
                    "wrote it.",
                ),
                io.Combo.Input(
                    "head_norm",
                    options=list(HEAD_NORMS),
                    default="exp",
                    advanced=True,
                    tooltip="The factor of the head's norm for a weight w: exp(w), or 1 + w. They hardly differ.",
                ),
                io.String.Input(
                    "tokenizer",
                    default="",
                    advanced=True,
                    tooltip="A directory with the tokenizer.json of Qwen/Qwen3.5-4B. Empty: beside the encoder, else "
                    "it is downloaded.",
                ),
                io.Combo.Input(
                    "device",
                    options=["default", "cpu"],
                    default="default",
                    advanced=True,
                    tooltip="cpu: never on the GPU, as in ComfyUI's own loader.",
                ),
            ],
            outputs=[io.Clip.Output(display_name="clip")],
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> Any:
        """Load again when a file was written anew under the same name."""
        paths = (folder_paths.get_full_path("text_encoders", inputs[name] or "") for name in _FILE_INPUTS)
        return [(path, os.stat(path).st_mtime_ns) for path in paths if path]

    @classmethod
    def execute(
        cls,
        clip_name: str,
        recurrence: str,
        use_alignment: bool,
        alignment_strength: float,
        use_calibration: bool,
        output_scale: float,
        alignment_file: str,
        calibration_file: str,
        head_norm: str,
        tokenizer: str,
        device: str,
    ) -> io.NodeOutput:
        from .encoder import load_clip  # transformers, which takes seconds, only for who asks for it

        def path(used: bool, name: str, argument: str) -> str | None:
            if not used:
                return None
            if name == _NO_FILE:
                raise invalid(argument, repr(name), "a file of models/text_encoders, or its use_ switch off")
            return folder_paths.get_full_path_or_raise("text_encoders", name)

        cpu = torch.device("cpu")
        clip = load_clip(
            folder_paths.get_full_path_or_raise("text_encoders", clip_name),
            recurrence,
            head_norm,
            alignment=path(use_alignment, alignment_file, "alignment_file"),
            alignment_strength=alignment_strength,
            calibration=path(use_calibration, calibration_file, "calibration_file"),
            output_scale=output_scale,
            tokenizer=tokenizer.strip() or None,
            embedding_directory=folder_paths.get_folder_paths("embeddings"),
            model_options={"load_device": cpu, "offload_device": cpu} if device == "cpu" else {},
        )
        return io.NodeOutput(clip)


class AnimaFast(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            AnimaFastRegion,
            AnimaFastRegions,
            AnimaFastAccelerate,
            AnimaFastRegionPreview,
            AnimaFastLoadQwen35CLIP,
        ]


async def comfy_entrypoint() -> AnimaFast:
    return AnimaFast()
