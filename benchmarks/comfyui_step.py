"""One sampling step of Anima in a real ComfyUI on the CPU: stock, ours, and what other packs do, in one run.

    python benchmarks/comfyui_step.py --comfyui ~/ComfyUI --regional-nodes ~/anima-regional-comfy-nodes

Anima at its real width (2048 channels, 16 heads of 128) with random weights and a few blocks, a conditional and an
unconditional row (CFG 4), four quadrant regions of 77 tokens and a base prompt of 60. Measured in every round, in a
shuffled order: the whole step, the cross-attention modules in it (with their projections), and the attention calls
alone. Before anything is timed, results that should agree are compared. Memory is measured in a process of its own for
each variant: what the peak of the cross-attention calls and of the step lies above what was there before the run.

Variants
    stock                the model without regions
    accelerate           Anima Accelerate
    soft, hard, blend    Anima Regions
    blend pack           one attention a prompt over padded rows, summed by weight, as Attention Couple packs do
    seed soft, seed hard anima-regional-comfy-nodes itself (needs --regional-nodes)
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OURS = ("accelerate", "soft", "hard", "blend")
PEERS = ("blend pack", "seed soft", "seed hard")
TOKENS, BASE, NEGATIVE = 77, 60, 30


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--comfyui", required=True, help="a ComfyUI checkout whose requirements are installed")
    parser.add_argument("--regional-nodes", help="a checkout of anima-regional-comfy-nodes")
    parser.add_argument(
        "--attention",
        choices=["pytorch", "default"],
        default="pytorch",
        help="ComfyUI's --use-pytorch-cross-attention, or its default on a CPU (sub-quadratic)",
    )
    parser.add_argument("--size", default="1024x1024")
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", help="variants, separated by commas")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--no-time", action="store_true")
    parser.add_argument("--json", help="write the figures and samples to this file")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    return parser.parse_args()  # fmt: skip


class Bench:
    """The model, and what each variant samples with."""

    def __init__(self, chosen: argparse.Namespace) -> None:
        sys.path[:0] = [str(Path(chosen.comfyui).resolve()), str(ROOT / "tests" / "comfyui")]
        sys.path.append(str(ROOT))
        from comfy.cli_args import args

        args.cpu = True
        args.use_pytorch_cross_attention = chosen.attention == "pytorch"
        import comfy.model_detection
        import comfy.sample
        import comfy.sd
        import tiny_anima
        import torch

        self.comfy, self.torch, self.prompts = comfy, torch, tiny_anima
        self.width, self.height = (int(n) for n in chosen.size.split("x"))
        self.pack_path = chosen.regional_nodes
        self.packs = None
        detect = comfy.model_detection.detect_unet_config

        def few_blocks(*arguments, **keywords):
            config = detect(*arguments, **keywords)
            return config if config is None else {**config, "num_blocks": chosen.blocks}

        comfy.model_detection.detect_unet_config = few_blocks
        weights = tiny_anima.state_dict(channels=2048, blocks=chosen.blocks)
        self.model = comfy.sd.load_diffusion_model_state_dict(weights)
        self.seconds = {"modules": 0.0, "calls": 0.0, "step": 0.0}
        self.peak = None  # of an attention call; a number while memory is measured
        self.whole = 0
        for block in self.model.model.diffusion_model.blocks:
            attention = block.cross_attn
            attention.attn_op = self._measured("calls", attention.attn_op)
            attention.forward = self._measured("modules", attention.forward)
        self.model.model.diffusion_model.forward = self._measured("step", self.model.model.diffusion_model.forward)
        self.positive = tiny_anima.conditioning(BASE, 1)
        self.negative = tiny_anima.conditioning(NEGATIVE, 2)
        self.texts = [tiny_anima.conditioning(TOKENS, 10 + i) for i in range(4)]
        rows, columns = torch.arange(self.height) < self.height // 2, torch.arange(self.width) < self.width // 2
        quadrants = [(r[:, None] & c[None]).float()[None] for r in (rows, ~rows) for c in (columns, ~columns)]
        self.masks = quadrants

    def _measured(self, name, function):
        def measured(*arguments, **keywords):
            before = None
            if self.peak is not None and name == "calls":
                self.whole = max(self.whole, high_water())
                reset_high_water()
                before = resident()
            if name == "step":
                self.seconds = dict.fromkeys(self.seconds, 0.0)
            start = time.perf_counter()
            out = function(*arguments, **keywords)
            self.seconds[name] += time.perf_counter() - start
            if before is not None:
                self.peak = max(self.peak, high_water() - before)
            return out

        return measured

    def variant(self, name):
        """(model, positive, negative) of a variant."""
        from anima_fast.integrations import comfyui as fast

        if name == "stock":
            return self.model, self.positive, self.negative
        if name == "accelerate":
            return fast.accelerate(self.model), self.positive, self.negative
        if name in OURS:
            kinds = {"soft": {}, "hard": {"mode": "hard"}, "blend": {"combine": "blend", "strength": 1.0}}
            regions = [fast.Region.make(text, mask) for text, mask in zip(self.texts, self.masks, strict=True)]
            kind = {**kinds[name], **({"base_weight": 0.2} if name == "blend" else {})}
            return fast.apply_regions(self.model, regions, fast.Settings(**kind)), self.positive, self.negative
        return self._blend_pack() if name == "blend pack" else self._seed(name.removeprefix("seed "))

    def _blend_pack(self):
        """Every prompt padded to 512 rows, one attention each, outputs summed by weight."""
        torch = self.torch
        grid = (self.height // 16, self.width // 16)
        weights = [torch.nn.functional.interpolate(m[None], grid, mode="area").flatten() for m in self.masks]
        weights = torch.stack([*weights, torch.full_like(weights[0], 0.2)])
        weights = (weights / weights.sum(0))[:, None, :, None]
        padded: list = []

        def wrapper(executor, x, timesteps, context, *arguments, **keywords):
            model, tags = executor.class_obj, keywords["transformer_options"]["cond_or_uncond"]
            if 0 not in tags:  # large pictures come one row at a time
                return executor(x, timesteps, context, *arguments, **keywords)
            cond, alone = tags.index(0), len(tags) == 1
            if not padded:
                for text in self.texts:
                    ((embeds, extra),) = text
                    ids, factors = extra["t5xxl_ids"][None], extra["t5xxl_weights"][None, :, None]
                    padded.append(model.preprocess_text_embeds(embeds, ids, t5xxl_weights=factors))
            rows = [*padded, context[cond : cond + 1]]
            rows = rows if alone else [context[1 - cond : 2 - cond], *rows]
            given = torch.cat(rows, dim=1).expand(len(tags), -1, -1)

            def override(func, q, k, v, heads, **kw):
                if k.shape[2] != given.shape[1]:
                    return func(q, k, v, heads, **kw)
                kw.pop("transformer_options")
                parts = list(zip(k.split(512, dim=2), v.split(512, dim=2), strict=True))
                each = [
                    func(q[cond : cond + 1], a[cond : cond + 1], b[cond : cond + 1], heads, **kw)
                    for a, b in parts[not alone :]
                ]
                out = sum(w * o for w, o in zip(weights, each, strict=True))
                if alone:
                    return out
                a, b = parts[0]
                other = func(q[1 - cond : 2 - cond], a[:1], b[:1], heads, **kw)
                return torch.cat([other, out] if cond else [out, other])

            keywords["transformer_options"] = {
                **keywords["transformer_options"],
                "optimized_attention_override": override,
            }
            return executor(x, timesteps, given, *arguments, **keywords)

        patched = self.model.clone()
        patched.add_wrapper_with_key("diffusion_model", "blend pack", wrapper)
        return patched, self.positive, self.negative

    def _seed(self, mode):
        """The pack's own four nodes, strength and the rest at their defaults, from the first step on."""
        if self.packs is None:
            folder = Path(self.pack_path)
            copy = Path(tempfile.mkdtemp())  # it writes a log beside itself
            for file in ("__init__.py", "nodes.py", "regional_core.py"):
                (copy / file).write_text((folder / file).read_text(encoding="utf-8"), encoding="utf-8")
            spec = importlib.util.spec_from_file_location(
                "seed_pack", copy / "__init__.py", submodule_search_locations=[str(copy)]
            )
            module = importlib.util.module_from_spec(spec)
            sys.modules["seed_pack"] = module
            spec.loader.exec_module(module)
            self.packs = module.NODE_CLASS_MAPPINGS
        one, two, three, four = self.texts
        joined, ranges = self.packs["AnimaRegionalConditioningConcat"]().concat(
            one, "last", two, three, four, self.positive
        )
        latent = {"samples": self.torch.zeros(1, 16, self.height // 8, self.width // 8)}
        grid = self.packs["AnimaMaskToTokenGrid"]()
        weights = grid.build(self.model, latent, self.masks[0], "area", True, *self.masks[1:])[0]
        bias = self.packs["AnimaBuildRegionalCrossAttnBias"]()
        template = bias.build(ranges, weights, "soft_log" if mode == "soft" else "hard", 1e-4, -80.0, 0.35, True, True)[
            0
        ]
        apply = self.packs["AnimaApplyRegionalAttentionHook"]()
        hooked = apply.apply(joined, self.negative, template, start_percent=0.0, model=self.model)
        return self.model, *hooked

    def step(self, sampled, steps=2):
        """The sampled latent; what the last step took is in `seconds`. In the first, prompts go through the
        adapter and plans are bound, which is done once a run, by the stock model as by every variant."""
        model, positive, negative = sampled
        latent = self.torch.zeros(1, 16, 1, self.height // 8, self.width // 8)
        noise = self.torch.randn(latent.shape, generator=self.torch.Generator().manual_seed(5))
        with self.torch.inference_mode():
            return self.comfy.sample.sample(
                model, noise, steps, 4.0, "euler", "simple", positive, negative, latent, disable_pbar=True, seed=1
            )


def status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"no {field} in /proc/self/status")


def resident() -> int:
    return status("VmRSS:")


def high_water() -> int:
    return status("VmHWM:")


def reset_high_water() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def memory_of(bench: Bench, name: str) -> dict[str, float]:
    """MiB above what was there before: the largest cross-attention call, and the whole step."""
    for first in ("stock", name):  # weights, libraries and their buffers
        bench.step(bench.variant(first), steps=1)
    sampled = bench.variant(name)
    before = resident()
    bench.peak = bench.whole = 0
    reset_high_water()
    bench.step(sampled, steps=1)
    step = max(bench.whole, high_water()) - before
    return {"call": bench.peak / 2**20, "step": step / 2**20}


def time_all(bench: Bench, names: list[str], rounds: int) -> dict[str, dict[str, list[float]]]:
    variants = {name: bench.variant(name) for name in names}
    pictures = {name: bench.step(sampled) for name, sampled in variants.items()}  # and the first, slower, step

    def error(name, expected):
        return float((pictures[name] - pictures[expected]).abs().max() / pictures[expected].abs().max())

    for name, expected in (("accelerate", "stock"), ("blend", "blend pack")):
        if name in names and expected in names and not error(name, expected) < 1e-4:
            raise SystemExit(f"{name} differs from {expected} by {error(name, expected):.2e} of the scale")
    samples: dict[str, dict[str, list[float]]] = {n: {part: [] for part in bench.seconds} for n in names}
    for number in range(rounds):
        order = random.Random(number).sample(names, len(names))
        for name in order:
            bench.step(variants[name])
            for part, seconds in bench.seconds.items():
                samples[name][part].append(seconds)
            took = ", ".join(f"{part} {seconds:.3f} s" for part, seconds in bench.seconds.items())
            print(f"round {number + 1}/{rounds} {name}: {took}", file=sys.stderr, flush=True)
    return samples


def main() -> None:
    chosen = options()
    if chosen.memory_of:
        print(json.dumps(memory_of(Bench(chosen), chosen.memory_of)))
        return
    names = ["stock", *OURS, "blend pack", *(["seed soft", "seed hard"] if chosen.regional_nodes else [])]
    if chosen.only:
        names = [name.strip() for name in chosen.only.split(",")]
        unknown = sorted(set(names) - {"stock", *OURS, *PEERS})
        if unknown:
            raise SystemExit(f"--only: got {', '.join(unknown)}; allowed: {', '.join(['stock', *OURS, *PEERS])}")
    result: dict = {"size": chosen.size, "blocks": chosen.blocks, "attention": chosen.attention, "variants": {}}
    memory = {}
    if not chosen.no_memory:
        for name in names:
            command = [sys.executable, __file__, *sys.argv[1:], "--memory-of", name]
            # Large blocks straight from the system, so that what is freed is no longer counted.
            environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"memory of {name}: {done.stderr[-2000:]}")
            memory[name] = json.loads(done.stdout.splitlines()[-1])
            print(f"memory of {name}: {memory[name]}", file=sys.stderr, flush=True)
    samples = {}
    if not chosen.no_time:
        bench = Bench(chosen)
        samples = time_all(bench, names, chosen.rounds)
        result["torch"] = bench.torch.__version__
        result["threads"] = bench.torch.get_num_threads()
    result["machine"] = platform.processor() or platform.machine()
    print(f"{chosen.size}, {chosen.blocks} blocks, ComfyUI's attention: {chosen.attention}")
    print(f"{'variant':<12} {'step':>9} {'modules':>9} {'calls':>9}   {'call peak':>10} {'step peak':>10}")
    for name in names:
        middle = {part: statistics.median(values) for part, values in samples.get(name, {}).items()}
        result["variants"][name] = {"median": middle, "samples": samples.get(name), "memory": memory.get(name)}
        cells = [f"{middle.get(part, math.nan):7.3f} s" for part in ("step", "modules", "calls")]
        peaks = [f"{memory.get(name, {}).get(part, math.nan):6.1f} MiB" for part in ("call", "step")]
        print(f"{name:<12} {' '.join(cells)}   {' '.join(peaks)}")
    if chosen.json:
        Path(chosen.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
