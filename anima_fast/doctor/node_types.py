"""What doctor knows of nodes without a server: the widgets of each in their order, and what the node is for.

A workflow saved by the user interface lists widget values without their names, so the order is what names them. A
server's /object_info knows all nodes and is used instead when there is one (`Workflow.to_api`, `read`).
"""

from __future__ import annotations

__all__ = [
    "CONTROL_AFTER_GENERATE",
    "FRONTEND_ONLY",
    "OUTPUT_NODES",
    "PRIMITIVES",
    "REROUTES",
    "SEEDS",
    "WIDGETS",
]

#: What the user interface may put behind a seed's value: what becomes of the seed after a run.
CONTROL_AFTER_GENERATE = frozenset({"fixed", "increment", "decrement", "randomize", "increment-wrap"})
SEEDS = frozenset({"seed", "noise_seed"})

#: Virtual nodes of the user interface: they are gone from the prompt that a server gets.
REROUTES = frozenset({"Reroute", "Reroute (rgthree)", "ReroutePrimitive|pysssss"})
FRONTEND_ONLY = REROUTES | {
    "Bookmark (rgthree)",
    "Fast Bypasser (rgthree)",
    "Fast Groups Bypasser (rgthree)",
    "Fast Groups Muter (rgthree)",
    "Fast Muter (rgthree)",
    "GetNode",
    "Label (rgthree)",
    "MarkdownNote",
    "Note",
    "PrimitiveNode",
    "SetNode",
}

#: Nodes of the server whose output is their own widget `value`.
PRIMITIVES = frozenset(
    {"PrimitiveBoolean", "PrimitiveFloat", "PrimitiveInt", "PrimitiveString", "PrimitiveStringMultiline"}
)

#: A workflow runs for the sake of these (a server's object_info says `output_node`).
OUTPUT_NODES = frozenset(
    {
        "AnimaFastRegionPreview",
        "ImageCompare",
        "MaskPreview",
        "PreviewAny",
        "PreviewImage",
        "SaveAnimatedPNG",
        "SaveAnimatedWEBP",
        "SaveImage",
        "SaveImageWebsocket",
        "SaveLatent",
        "SaveVideo",
        "SaveWEBM",
    }
)

_SAMPLING = ("steps", "cfg", "sampler_name", "scheduler")
_SIZE = ("width", "height", "batch_size")
_CROP = ("crop_top", "crop_left", "crop_bottom", "crop_right")

#: Widgets in the order of `widgets_values`. Seeds may be followed by a value of CONTROL_AFTER_GENERATE.
WIDGETS: dict[str, tuple[str, ...]] = {
    # loaders
    "CheckpointLoaderSimple": ("ckpt_name",),
    "CLIPLoader": ("clip_name", "type", "device"),
    "DualCLIPLoader": ("clip_name1", "clip_name2", "type", "device"),
    "LoraLoader": ("lora_name", "strength_model", "strength_clip"),
    "LoraLoaderModelOnly": ("lora_name", "strength_model"),
    "ModelPatchLoader": ("name",),
    "UNETLoader": ("unet_name", "weight_dtype"),
    "UpscaleModelLoader": ("model_name",),
    "VAELoader": ("vae_name",),
    # patches of the model
    "AnimaLLLiteApply": ("strength", "start_percent", "end_percent"),
    "BasicScheduler": ("scheduler", "steps", "denoise"),
    "BetaSamplingScheduler": ("steps", "alpha", "beta"),
    "CFGNorm": ("strength", "pre_cfg"),
    "EasyCache": ("reuse_threshold", "start_percent", "end_percent", "verbose"),
    "FreeU_V2": ("b1", "b2", "s1", "s2"),
    "HyperTile": ("tile_size", "swap_size", "max_depth", "scale_depth"),
    "LazyCache": ("reuse_threshold", "start_percent", "end_percent", "verbose"),
    "ModelAttentionBackend": ("attention",),
    "ModelComputeDtype": ("dtype",),
    "ModelSamplingAuraFlow": ("shift", "sampling"),
    "ModelSamplingContinuousEDM": ("sampling", "sigma_max", "sigma_min"),
    "ModelSamplingContinuousV": ("sampling", "sigma_max", "sigma_min"),
    "ModelSamplingDiscrete": ("sampling", "zsnr"),
    "ModelSamplingFlux": ("max_shift", "base_shift", "width", "height"),
    "ModelSamplingLTXV": ("max_shift", "base_shift"),
    "ModelSamplingSD3": ("shift",),
    "ModelSamplingStableCascade": ("shift",),
    "PatchModelAddDownscale": (
        "block_number",
        "downscale_factor",
        "start_percent",
        "end_percent",
        "downscale_after_skip",
        "downscale_method",
        "upscale_method",
    ),
    "PathchSageAttentionKJ": ("sage_attention", "allow_compile"),
    "RescaleCFG": ("multiplier",),
    "TiledDiffusion": ("method", "tile_width", "tile_height", "tile_overlap", "tile_batch_size"),
    "TorchCompileModel": ("backend",),
    # sampling
    "BasicGuider": (),
    "CFGGuider": ("cfg",),
    "FlipSigmas": (),
    "KSampler": ("seed", *_SAMPLING, "denoise"),
    "KSamplerAdvanced": (
        "add_noise",
        "noise_seed",
        *_SAMPLING,
        "start_at_step",
        "end_at_step",
        "return_with_leftover_noise",
    ),
    "KSamplerSelect": ("sampler_name",),
    "RandomNoise": ("noise_seed",),
    "SamplerCustom": ("add_noise", "noise_seed", "cfg"),
    "SamplerCustomAdvanced": (),
    "SplitSigmas": ("step",),
    "SplitSigmasDenoise": ("denoise",),
    # conditioning
    "CLIPSetLastLayer": ("stop_at_clip_layer",),
    "CLIPTextEncode": ("text",),
    "ConditioningConcat": (),
    "ConditioningSetArea": ("width", "height", "x", "y", "strength"),
    "ConditioningSetAreaPercentage": ("width", "height", "x", "y", "strength"),
    "ConditioningSetMask": ("strength", "set_cond_area"),
    "ConditioningSetTimestepRange": ("start", "end"),
    "ConditioningZeroOut": (),
    # latents
    "EmptyHunyuanLatentVideo": ("width", "height", "length", "batch_size"),
    "EmptyLatentImage": _SIZE,
    "EmptySD3LatentImage": _SIZE,
    "LatentFromBatch": ("batch_index", "length"),
    "LatentUpscale": ("upscale_method", "width", "height", "crop"),
    "LatentUpscaleBy": ("upscale_method", "scale_by"),
    "RepeatLatentBatch": ("amount",),
    "SetLatentNoiseMask": (),
    "VAEDecode": (),
    "VAEDecodeTiled": ("tile_size", "overlap", "temporal_size", "temporal_overlap"),
    "VAEEncode": (),
    "VAEEncodeForInpaint": ("grow_mask_by",),
    "VAEEncodeTiled": ("tile_size", "overlap", "temporal_size", "temporal_overlap"),
    # images and masks
    "FeatherMask": ("left", "top", "right", "bottom"),
    "GetImageSize": (),
    "GrowMask": ("expand", "tapered_corners"),
    "ImageScale": ("upscale_method", "width", "height", "crop"),
    "ImageScaleBy": ("upscale_method", "scale_by"),
    "ImageScaleToTotalPixels": ("upscale_method", "megapixels", "resolution_steps"),
    "ImageToMask": ("channel",),
    "ImageUpscaleWithModel": (),
    "InvertMask": (),
    "LoadImage": ("image",),
    "LoadImageMask": ("image", "channel"),
    "MaskComposite": ("x", "y", "operation"),
    "MaskPreview": (),
    "PreviewImage": (),
    "ResolutionSelector": ("aspect_ratio", "megapixels", "multiple"),
    "SaveImage": ("filename_prefix",),
    "SaveLatent": ("filename_prefix",),
    "SolidMask": ("value", "width", "height"),
    "ThresholdMask": ("value",),
    # values and switches
    "ComfySwitchNode": ("switch",),
    "PrimitiveBoolean": ("value",),
    "PrimitiveFloat": ("value",),
    "PrimitiveInt": ("value",),
    "PrimitiveString": ("value",),
    "PrimitiveStringMultiline": ("value",),
    # the regional pack that this tool's first report was about
    "AnimaApplyRegionalAttentionHook": (
        "apply_to_cross_attn_only",
        "attention_backend",
        "start_percent",
        "end_percent",
        "debug_shapes",
        "enabled",
    ),
    "AnimaBuildRegionalCrossAttnBias": (
        "mode",
        "eps",
        "hard_value",
        "strength",
        "base_always_allowed",
        "unmasked_to_base",
    ),
    "AnimaMaskToTokenGrid": ("downscale_mode", "normalize_overlaps"),
    "AnimaRegionalConditioningConcat": ("base_position",),
    # anima_fast
    "AnimaFastAccelerate": ("debug",),
    "AnimaFastLoadQwen35CLIP": (
        "clip_name",
        "recurrence",
        "use_alignment",
        "alignment_strength",
        "use_calibration",
        "output_scale",
        "alignment_file",
        "calibration_file",
        "head_norm",
        "tokenizer",
        "device",
    ),
    "AnimaFastRegion": ("strength", "priority", "name"),
    "AnimaFastRegionPreview": ("width", "height", "normalize_overlaps", "resample"),
    "AnimaFastRegions": (
        "combine",
        "mode",
        "strength",
        "start_percent",
        "end_percent",
        "outside",
        "base_always_allowed",
        "unmasked_to_base",
        "base_weight",
        "normalize_overlaps",
        "eps",
        "hard_value",
        "resample",
        "pads",
        "blocks",
        "canvas_width",
        "canvas_height",
        "stretch_masks",
        *_CROP,
        "debug",
    ),
}
