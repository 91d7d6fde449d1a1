"""diffusers' Anima pipeline, tiny and random: regions, in the pipeline and on the command line.

What regions must give is computed by diffusers' own attention over padded prompts with a materialised mask. It uses
`RegionPlan.segment_rows` for the mask's values and nothing else of ours.
"""

from __future__ import annotations

import logging
from collections import Counter

import pytest
import torch

pytest.importorskip("diffusers", "0.42", reason="needs diffusers >= 0.42: pip install 'anima-fast[diffusers]'")
pytest.importorskip("transformers", reason="needs transformers: pip install 'anima-fast[diffusers]'")

import tiny_pipeline
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.modular_pipelines.anima.encoders import AnimaTextEncoderStep

from anima_fast import RegionPlan
from anima_fast.integrations import diffusers as regional
from anima_fast.integrations.diffusers import Region

pytestmark = pytest.mark.usefixtures("one_thread")

WIDTH, HEIGHT = 96, 64
GRID = (1, HEIGHT // 16, WIDTH // 16)
STEPS = 3
TOLERANCE = 2e-5  # of the latents' largest value, after all steps


def halves(rows=HEIGHT, columns=WIDTH):
    left = torch.zeros(rows, columns)
    left[:, : columns // 2 + 5] = 1  # the edge is inside a token
    return left, 1 - left


LEFT, RIGHT = halves()
REGIONS = (Region(LEFT, "a red house"), Region(RIGHT, "green tree, 3 cats", strength=0.8))


@pytest.fixture(scope="module")
def shared():
    return tiny_pipeline.build()


@pytest.fixture
def pipe(shared):
    yield shared
    regional.disable(shared)
    shared.scheduler.set_shift(3.0)


def sample(pipe, prompt="blue cat", negative="left, left", size=(WIDTH, HEIGHT), **changed):
    arguments = dict(width=size[0], height=size[1], num_inference_steps=STEPS, negative_prompt=negative)
    if isinstance(prompt, list) and isinstance(negative, str):
        arguments["negative_prompt"] = [negative] * len(prompt)
    arguments["generator"] = torch.Generator().manual_seed(7)
    return pipe(prompt=prompt, output="latents", **(arguments | changed))


def relative(got, expected):
    return float((got - expected).abs().max() / expected.abs().max())


class Padded:
    """Cross-attention over padded prompts under a mask, one block's. On conditional calls in the window only."""

    def __init__(self, reference, original, in_blocks=True):
        self.reference, self.original, self.in_blocks = reference, original, in_blocks

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None):
        ref = self.reference
        if not ref.pipe.guider.is_conditional:
            return self.original(attn, hidden_states, encoder_hidden_states=encoder_hidden_states)
        active = ref.active() and self.in_blocks
        if not active and ref.outside == "base":
            return self.original(attn, hidden_states, encoder_hidden_states=encoder_hidden_states)
        parts = [c.to(encoder_hidden_states).expand(len(hidden_states), -1, -1) for c in ref.contexts()]
        parts += [encoder_hidden_states] if ref.base else []
        rows = ref.rows if active else torch.zeros_like(ref.rows)
        if active and ref.combine == "blend":
            weight = rows / rows.sum(dim=0)
            outs = [self.attend(attn, hidden_states, part, None) for part in parts]
            out = sum(w[None, :, None, None] * out for w, out in zip(weight.to(outs[0]), outs, strict=True))
        else:
            columns = [row[:, None].expand(-1, part.shape[1]) for row, part in zip(rows, parts, strict=True)]
            mask = torch.cat(columns, dim=1).to(hidden_states)[None, None]
            out = self.attend(attn, hidden_states, torch.cat(parts, dim=1), mask)
        return attn.to_out[1](attn.to_out[0](out.flatten(2)))

    @staticmethod
    def attend(attn, hidden_states, context, mask):
        q, k, v = (
            f(x).unflatten(2, (attn.heads, -1))
            for f, x in ((attn.to_q, hidden_states), (attn.to_k, context), (attn.to_v, context))
        )
        return dispatch_attention_fn(attn.norm_q(q), attn.norm_k(k), v, attn_mask=mask)


class Reference:
    """While active, the pipeline computes what `regional.enable` with the same arguments must give."""

    def __init__(self, pipe, regions, *, steps=None, outside="all", base=True, blocks=None, grid=GRID, **plan):
        self.pipe, self.regions, self.steps, self.outside, self.base = pipe, regions, steps, outside, base
        self.blocks = blocks
        self.combine = plan.get("combine", "logit")
        if "strength" not in plan:
            plan["strength"] = 0.35 if self.combine == "logit" and plan.get("mode") != "hard" else 1.0
        count = len(regions)
        self.rows = (
            RegionPlan.from_masks(
                [r.mask for r in regions],
                [(i, i + 1) for i in range(count)],
                base_range=(count, count + 1) if base else None,
                region_strengths=[r.strength for r in regions],
                priorities=[r.priority for r in regions],
                **plan,
            )
            .segment_rows(grid)
            .flatten(1)
            .float()
        )

    def contexts(self):
        """As the conditioner gives them at this moment, padded."""
        found = []
        for region in self.regions:
            text = AnimaTextEncoderStep.encode_prompt(self.pipe, region.prompt, prepare_unconditional_embeds=False)
            found.append(
                self.pipe.text_conditioner(
                    source_hidden_states=text["qwen_prompt_embeds"].to(self.pipe.text_conditioner.dtype),
                    source_attention_mask=text["qwen_attention_mask"],
                    target_input_ids=text["t5_input_ids"],
                    target_attention_mask=text["t5_attention_mask"],
                )
            )
        return found

    def active(self):
        return self.steps is None or self.pipe.guider._step in self.steps

    def __enter__(self):
        self.attentions = [block.attn2 for block in self.pipe.transformer.transformer_blocks]
        self.originals = [attention.processor for attention in self.attentions]
        for index, attention in enumerate(self.attentions):
            inside = self.blocks is None or index in self.blocks
            attention.set_processor(Padded(self, attention.processor, inside))

    def __exit__(self, *_):
        for attention, original in zip(self.attentions, self.originals, strict=True):
            attention.set_processor(original)


def both(pipe, regions=REGIONS, run=sample, reference=None, **arguments):
    """run(pipe) with our regions and with the reference's, and what ours served."""
    window = ("start_percent", "end_percent")
    of_reference = {name: value for name, value in arguments.items() if name not in window}
    with Reference(pipe, regions, **of_reference, **(reference or {})):
        expected = run(pipe)
    with regional.enable(pipe, regions, **arguments) as enabled:
        got = run(pipe)
    assert not enabled.declined
    assert relative(expected, run(pipe)) > 50 * TOLERANCE, "the regions change nothing: the comparison is empty"
    return got, expected, enabled.served


PLANS = {
    "soft": {},
    "soft 1": dict(strength=1.0, eps=1e-3),
    "hard": dict(mode="hard"),
    "hard -80": dict(mode="hard", hard_value=-80.0, strength=0.5),
    "base not allowed": dict(mode="hard", base_always_allowed=False, resample="nearest"),
    "blend": dict(combine="blend", base_weight=0.2),
    "blend hard": dict(combine="blend", mode="hard"),
    "no base": dict(base=False, strength=0.7),
    "first block": dict(blocks=[0]),
    "max": dict(resample="max", normalize_overlaps=False),
}


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_regions_are_a_masked_reference(pipe, plan):
    got, expected, served = both(pipe, **plan)
    assert relative(got, expected) < TOLERANCE
    blocks = len(pipe.transformer.transformer_blocks)
    regional_blocks = len(plan.get("blocks", range(blocks)))
    outside = Counter(outside=(blocks - regional_blocks) * STEPS)
    assert served == +(Counter(regions=regional_blocks * STEPS, plain=blocks * STEPS) + outside)


def test_priorities_and_mappings(pipe, tmp_path):
    from PIL import Image

    Image.new("L", (7, 5), 255).save(tmp_path / "all.png")
    regions = [
        {"mask": tmp_path / "all.png", "prompt": "red tree"},
        {"mask": LEFT.numpy(), "prompt": "green cat", "priority": 2, "strength": 0.6},
    ]
    got, expected, _ = both(pipe, [Region(**r) for r in regions], strength=0.8)
    assert relative(got, expected) < TOLERANCE
    with regional.enable(pipe, regions, strength=0.8):
        assert torch.equal(sample(pipe), got)


def test_off_is_bit_equal(pipe):
    processors = [block.attn2.processor for block in pipe.transformer.transformer_blocks]
    before = sample(pipe)
    regional.enable(pipe, REGIONS)
    assert not torch.equal(sample(pipe), before)
    regional.disable(pipe)
    assert torch.equal(sample(pipe), before)
    assert all(b.attn2.processor is p for b, p in zip(pipe.transformer.transformer_blocks, processors, strict=True))
    for module in (pipe.transformer, pipe.text_conditioner):
        assert not module._forward_hooks and not module._forward_pre_hooks and not hasattr(module, "_anima_fast")
    regional.disable(pipe)
    with pytest.raises(KeyError), regional.enable(pipe, REGIONS):
        raise KeyError
    assert torch.equal(sample(pipe), before)


def test_enabling_again_replaces(pipe):
    with regional.enable(pipe, REGIONS[:1]):
        first = sample(pipe)
    regional.enable(pipe, REGIONS)
    second = sample(pipe)
    regional.enable(pipe, REGIONS[:1])
    assert torch.equal(sample(pipe), first) and not torch.equal(first, second)


def test_without_regions_only_pads_are_folded(pipe):
    expected = sample(pipe)
    with regional.enable(pipe) as enabled:
        got = sample(pipe)
    assert relative(got, expected) < TOLERANCE
    assert enabled.served == {"plain": 2 * 2 * STEPS} and not enabled.declined
    with regional.enable(pipe, pads="strip"):
        assert relative(sample(pipe), expected) > 1e-3


def test_what_is_read_is_the_real_rows(pipe):
    """Pads are counts: no key of theirs is projected."""
    seen = set()
    hook = pipe.transformer.transformer_blocks[0].attn2.to_k.register_forward_hook(
        lambda module, inputs, output: seen.add(inputs[0].shape[1])
    )
    try:
        with regional.enable(pipe, REGIONS):
            sample(pipe)
    finally:
        hook.remove()
    lengths = [len(pipe.t5_tokenizer(text).input_ids) for text in (*(r.prompt for r in REGIONS), "blue cat")]
    assert seen == {sum(lengths), len(pipe.t5_tokenizer("left, left").input_ids)}


@pytest.mark.parametrize("plan", [{}, dict(combine="blend", base_weight=0.5)], ids=["logit", "blend"])
def test_batch(pipe, plan):
    """Prompts of different lengths, several pictures each: every row has its own base prompt."""
    prompts = ["blue cat", "a tree on the right, 1 house on the left", "red"]

    def run(p):
        return sample(p, prompts, ["left", "green, green, green", ""], num_images_per_prompt=2)

    got, expected, _ = both(pipe, run=run, **plan)
    assert got.shape[0] == 6 and relative(got, expected) < TOLERANCE


def test_prompts_longer_than_the_padding(pipe):
    long = "cat, tree, " * tiny_pipeline.ROWS

    def run(p):
        return sample(p, long, "dog, " * tiny_pipeline.ROWS)

    got, expected, _ = both(pipe, [*REGIONS, Region(LEFT, long + "house")], run=run)
    assert relative(got, expected) < TOLERANCE


@pytest.mark.parametrize("plan", [{}, dict(mode="hard"), dict(combine="blend"), dict(base=False), dict(pads="strip")])
@pytest.mark.parametrize("outside", ["all", "base"])
def test_a_batch_of_layouts(pipe, plan, outside):
    """Each row as if its prompt, negative prompt and regions came alone, one longer than the padding among them."""
    rows = [REGIONS, (), (Region(RIGHT[:32].T, "green tree, 3 cats"),), (*REGIONS, Region(torch.ones(8, 8), "red"))]
    prompts = ["blue cat", "a house, " * 8, "left", ""]
    negatives = ["left, left", "", "a tree " * 9, "red"]
    window = dict(end_percent=0.5, outside=outside)
    alone = []
    for i, row in enumerate(rows):
        with regional.enable(pipe, row, **plan, **window):
            alone.append(sample(pipe, prompts[i], negatives[i], generator=torch.Generator().manual_seed(i)))
    generators = [torch.Generator().manual_seed(i) for i in range(4)]
    with regional.enable(pipe, rows, **plan, **window) as enabled:
        together = sample(pipe, prompts, negatives, generator=generators)
    assert not enabled.declined and enabled.served["regions"]
    for got, expected in zip(together, alone, strict=True):
        assert relative(got, expected[0]) < TOLERANCE


def test_lists_of_regions_for_other_prompts(pipe):
    with (
        regional.enable(pipe, [REGIONS, REGIONS[:1]]),
        pytest.raises(ValueError, match=r"regions: got 2 lists of regions for 3 prompts"),
    ):
        sample(pipe, ["a", "b", "c"])
    with pytest.raises(TypeError, match=r"regions\[1\]\[0\]: got str"):
        regional.enable(pipe, [REGIONS, ["cat"]])


def test_image_to_image(pipe):
    from PIL import Image

    picture = Image.linear_gradient("L").resize((WIDTH, HEIGHT)).convert("RGB")

    def run(p):
        return sample(p, image=picture, strength=0.7, num_inference_steps=4)

    got, expected, served = both(pipe, run=run)
    assert relative(got, expected) < TOLERANCE
    assert served["regions"] == 2 * 3  # the last three of four steps


def test_guidance_off_and_other_guiders(pipe):
    from diffusers import AdaptiveProjectedGuidance

    guider = pipe.guider
    try:
        pipe.update_components(guider=guider.new(guidance_scale=1.0))
        got, expected, served = both(pipe)
        assert relative(got, expected) < TOLERANCE and served.keys() == {"regions"}
        pipe.update_components(guider=AdaptiveProjectedGuidance(guidance_scale=3.0))
        got, expected, served = both(pipe)
        assert relative(got, expected) < TOLERANCE and served["regions"] == served["plain"]
    finally:
        pipe.update_components(guider=guider)


@pytest.mark.parametrize("outside", ["all", "base"])
@pytest.mark.parametrize(("start", "end", "steps"), [(0.2, 0.6, [1, 2, 3]), (0.0, 0.19, [0]), (0.41, 1.0, [3, 4])])
@pytest.mark.parametrize("shift", [3.0, 1.0])
def test_window(pipe, outside, start, end, steps, shift):
    """Five steps begin at 0, 20, 40, 60 and 80 %, whatever the shift; both ends belong to the window."""
    pipe.scheduler.set_shift(shift)
    got, expected, served = both(
        pipe,
        run=lambda p: sample(p, num_inference_steps=5),
        reference=dict(steps=steps),
        start_percent=start,
        end_percent=end,
        outside=outside,
    )
    assert relative(got, expected) < TOLERANCE
    assert served == {"regions": 2 * len(steps), "outside": 2 * (5 - len(steps)), "plain": 2 * 5}


def test_window_of_image_to_image(pipe):
    """Its first step is not at 0 %: of five, strength 0.6 runs those at 40, 60 and 80 %; only the first is inside."""
    from PIL import Image

    picture = Image.linear_gradient("L").resize((WIDTH, HEIGHT)).convert("RGB")
    with regional.enable(pipe, REGIONS, start_percent=0.3, end_percent=0.5) as enabled:
        sample(pipe, image=picture, strength=0.6, num_inference_steps=5)
    assert enabled.served == {"regions": 2, "outside": 2 * 2, "plain": 2 * 3}


def test_blend_outside_its_window(pipe):
    """All prompts there, unbiased, in one softmax; nothing to blend by."""
    got, expected, _ = both(pipe, reference=dict(steps=[1, 2]), start_percent=0.2, combine="blend")
    assert relative(got, expected) < TOLERANCE


def test_blocks_from_the_end(pipe):
    with regional.enable(pipe, REGIONS, blocks=[1]):
        expected = sample(pipe)
    with regional.enable(pipe, REGIONS, blocks=[-1]):
        assert torch.equal(sample(pipe), expected)


def test_one_prompt_on_two_grids(pipe):
    """The same tensor of prompts, as in a second pass at another size."""
    pipe.guider.set_state(step=0, num_inference_steps=1, timestep=None)
    pipe.guider.prepare_models(pipe.transformer)
    assert pipe.guider.is_conditional
    embeds = torch.randn(1, tiny_pipeline.ROWS, 32)

    def call(rows, columns):
        latents = torch.ones(1, 16, 1, rows, columns)
        time = torch.full((1,), 0.5)
        return pipe.transformer(latents, time, embeds, return_dict=False)[0]

    with regional.enable(pipe, REGIONS) as enabled:
        first, second, again = call(4, 6), call(8, 8), call(4, 6)
    assert second.shape[-2:] == (8, 8) and torch.equal(first, again) and enabled.served == {"regions": 6}


def test_percent_to_sigma():
    assert regional.percent_to_sigma(0.0, 3.0) == 1.0
    assert regional.percent_to_sigma(1.0, 3.0) == 0.0
    assert regional.percent_to_sigma(0.5, 3.0) == 0.75
    assert regional.percent_to_sigma(0.25, 1.0) == 0.75


@pytest.mark.parametrize("bias", [False, True], ids=["", "with a bias, so that pads are not zero"])
@pytest.mark.filterwarnings("ignore:`lora_bias=True`")
def test_lora_loaded_later(bias):
    """On the transformer and on the text conditioner, which the regions' texts must go through again."""
    peft = pytest.importorskip("peft", reason="needs peft: LoRA layers are its")
    pipe = tiny_pipeline.build()
    with regional.enable(pipe, REGIONS) as enabled:
        without = sample(pipe)
        torch.manual_seed(3)
        for module, targets in ((pipe.transformer, ["to_q", "to_k", "to_v"]), (pipe.text_conditioner, ["q_proj"])):
            config = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False, lora_bias=bias)
            module.add_adapter(config)
            module.requires_grad_(False)
            for name, p in module.named_parameters():
                if "lora" in name:
                    p.normal_(std=0.3)
        got = sample(pipe)
        assert relative(got, without) > 0.01 and not enabled.declined
    with Reference(pipe, REGIONS):
        expected = sample(pipe)
    assert relative(got, expected) < TOLERANCE


def test_bfloat16(shared):
    """Not farther from fp32 than twice the reference in bf16 is."""
    pipe = tiny_pipeline.build()
    exact, _, _ = both(pipe)
    pipe.to(torch.bfloat16)
    got, expected, _ = both(pipe)
    assert relative(got, exact) <= 2 * relative(expected, exact) + 2 * torch.finfo(torch.bfloat16).eps


def test_other_sizes_and_a_second_run(pipe):
    """The plan follows the picture that is sampled; nothing of one run is left for the next."""
    with regional.enable(pipe, REGIONS):
        first = sample(pipe)
        for size in ((64, 64), (32, 128)):
            got = sample(pipe, "red", size=size)
            with Reference(pipe, REGIONS, grid=(1, size[1] // 16, size[0] // 16)):
                # in place of ours
                assert relative(got, sample(pipe, "red", size=size)) < TOLERANCE
        assert torch.equal(sample(pipe), first)


def test_padding_mask_channel():
    """As the real model has it: diffusers resizes the mask with torchvision."""
    pytest.importorskip("torchvision", reason="needs torchvision: diffusers resizes Anima's padding mask with it")
    got, expected, _ = both(tiny_pipeline.build(concat_padding_mask=True))
    assert relative(got, expected) < TOLERANCE


def test_inference_mode(pipe):
    with torch.inference_mode():
        got, expected, _ = both(pipe)
    assert relative(got, expected) < TOLERANCE


def test_what_is_not_served_is_left_to_diffusers(pipe, caplog):
    """Training, and a transformer called with what it has no use for: diffusers' own result, and one warning."""
    transformer = pipe.transformer
    inputs = dict(
        hidden_states=torch.randn(1, 16, 1, 4, 6),
        timestep=torch.full((1,), 0.5),
        encoder_hidden_states=torch.randn(1, tiny_pipeline.ROWS, 32),
        return_dict=False,
    )
    masked = inputs | dict(attention_mask=torch.zeros(1, tiny_pipeline.ROWS))
    with_gradient = inputs | dict(hidden_states=inputs["hidden_states"].clone().requires_grad_())
    expected = [transformer(**masked)[0], transformer(**with_gradient)[0]]
    with regional.enable(pipe, REGIONS) as enabled, caplog.at_level(logging.WARNING):
        assert torch.equal(transformer(**masked)[0], expected[0])
        got = transformer(**with_gradient)[0]
        got.sum().backward()
    assert torch.equal(got, expected[1]) and with_gradient["hidden_states"].grad is not None
    assert sorted(enabled.declined.values()) == [2, 2]
    assert len([r for r in caplog.records if r.name == regional.__name__]) == 2


def test_a_long_prompt_is_named(pipe):
    with pytest.warns(
        UserWarning, match=r"regions\[1\]\.prompt has 5 tokens and is cut off after max_sequence_length = 4"
    ):
        regional.enable(pipe, [Region(LEFT, "a"), Region(RIGHT, "a red tree cat")], max_sequence_length=4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(regions="left.png"), "regions: got str"),
        (dict(regions=REGIONS[0]), "regions: got Region"),
        (dict(regions=["left.png"]), r"regions\[0\]: got str"),
        (dict(regions=[{"mask": LEFT}]), r"regions\[0\].prompt: got nothing"),
        (dict(regions=[{"mask": LEFT, "prompt": "a", "text": 1}]), r"regions\[0\]: got the unknown key 'text'"),
        (dict(regions=[Region(LEFT, 3)]), r"regions\[0\].prompt: got int"),
        (dict(regions=[Region(LEFT * 255, "a")]), r"regions\[0\].mask: got values from 0 to 255"),
        (dict(regions=[Region("nowhere.png", "a")]), r"regions\[0\].mask: no file 'nowhere.png'"),
        (dict(regions=[REGIONS[0], Region(LEFT, "a", strength=-1)]), r"regions\[1\].strength: got -1"),
        (dict(regions=[REGIONS[0], Region(LEFT, "a", priority=float("nan"))]), r"regions\[1\].priority: got nan"),
        (dict(start_percent=2), "start_percent: got 2"),
        (dict(start_percent=0.5, end_percent=0.2), "end_percent: got 0.2, before start_percent = 0.5"),
        (dict(outside="none"), "outside: got 'none'; allowed: 'all' | 'base'"),
        (dict(blocks=[2]), "blocks: got 2; allowed: whole numbers from -2 to 1"),
        (dict(blocks="01"), "blocks: got str"),
        (dict(mode="medium"), "mode: got 'medium'"),
        (dict(strength=-1), "strength: got -1"),
        (dict(strenght=1), "the unknown argument 'strenght'; allowed: .*mode"),
        (dict(max_sequence_length=0), "max_sequence_length: got 0"),
        (dict(backend="cudnn"), "backend: got 'cudnn'; allowed: .*'torch'"),
    ],
)
def test_bad_arguments_are_named(pipe, arguments, message):
    regional.enable(pipe)
    before = pipe.transformer.transformer_blocks[0].attn2.processor
    with pytest.raises((ValueError, TypeError, FileNotFoundError), match=message):
        regional.enable(pipe, **({"regions": REGIONS} | arguments))
    assert pipe.transformer.transformer_blocks[0].attn2.processor is before


def test_bad_pipelines_are_named(pipe):
    from diffusers import AnimaAutoBlocks, FlowMatchEulerDiscreteScheduler, TangentialClassifierFreeGuidance

    with pytest.raises(TypeError, match="pipe: got Linear; allowed: an AnimaModularPipeline"):
        regional.enable(torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="pipe: got AnimaModularPipeline without transformer, .*load_components"):
        regional.enable(AnimaAutoBlocks().init_pipeline())
    scheduler, guider = pipe.scheduler, pipe.guider
    try:
        pipe.update_components(guider=TangentialClassifierFreeGuidance())
        with pytest.raises(ValueError, match="pipe: got the guider TangentialClassifierFreeGuidance"):
            regional.enable(pipe, REGIONS)
        pipe.update_components(guider=guider)
        pipe.update_components(scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True))
        with pytest.raises(ValueError, match="a scheduler whose shift depends on the picture's size"):
            regional.enable(pipe, REGIONS, end_percent=0.5)
    finally:
        pipe.update_components(scheduler=scheduler, guider=guider)
