"""The text encoder at its full size on this machine: does it load, what does a prompt cost, and where does the time go.

    python benchmarks/encoder.py                        # FP8 + BF16, 4.8 GB on disk, gdn, prompts of 77 and 512 tokens
    python benchmarks/encoder.py --recurrence mamba2 --json mamba2.json
    python benchmarks/encoder.py --layers 4 --rows 1000     # a small one, to see that it works

A checkpoint of Qwen3.5-4B's 426 tensors with random values of realistic scale is written to a temporary directory, and
removed in the end (or kept: --file). A process of its own then loads and encodes it, so that memory is the encoder's
alone: anonymous memory, and what of the mapped file is resident (which the system may drop at any time).

Each round measures, for each length in turn, our encoder and (gdn only) the same model with transformers' own torch
functions in the recurrent layers, after comparing their results. Time is split into

    matmuls         every linear layer; of it, widening FP8 weights
    scan + conv     the recurrence and the convolution before it
    rest            norms, gates, attention, embedding
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

TOLERANCE = 1e-3  # of the scale of the states, between our ops and transformers' functions after all layers


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recurrence", choices=["gdn", "mamba2"], default="gdn")
    parser.add_argument("--stored", choices=["fp8", "bf16"], default="fp8", help="type of the matrices in the file")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="what is computed in")
    parser.add_argument("--lengths", default="77,512", help="tokens a prompt")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--rows", type=int, default=248320, help="of the embedding")
    parser.add_argument("--file", help="write the checkpoint here and keep it; use it if it is there")
    parser.add_argument("--json", help="write the figures and samples to this file")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    return parser.parse_args()


def write_checkpoint(path: Path, chosen: argparse.Namespace) -> None:
    """A safetensors file, tensor by tensor: never more than one of them in memory."""
    import tiny_encoder
    import torch
    from tqdm import tqdm

    from anima_fast.encoder.checkpoint import EncoderConfig

    config = EncoderConfig()
    config = dataclasses.replace(config, vocab_size=chosen.rows, layer_types=config.layer_types[: chosen.layers])
    names = {torch.bfloat16: "BF16", torch.float8_e4m3fn: "F8_E4M3"}
    header, end = {}, 0
    for name, shape in config.shapes().items():
        dtype = tiny_encoder.dtype_of(name, shape, torch.bfloat16, chosen.stored == "fp8")
        size = torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": names[dtype], "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    generator = torch.Generator().manual_seed(0)
    with open(path, "wb") as file, tqdm(total=end, unit="B", unit_scale=True, desc="checkpoint") as bar:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, shape in config.shapes().items():
            dtype = tiny_encoder.dtype_of(name, shape, torch.bfloat16, chosen.stored == "fp8")
            value = tiny_encoder.value(name, shape, generator).to(dtype)
            file.write(value.view(torch.uint8).numpy())
            bar.update(value.nbytes)


class Memory:
    """Peaks of this process while a block runs, in GB, sampled every 10 ms (the total also by the system itself)."""

    def __enter__(self) -> Memory:
        self.peaks: dict[str, float] = defaultdict(float)
        self.done = threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.done.set()
        self.thread.join()
        self.look()

    def watch(self) -> None:
        while not self.done.wait(0.01):
            self.look()

    def look(self) -> None:
        for line in Path("/proc/self/status").read_text().splitlines():
            name, _, rest = line.partition(":")
            if name in ("VmHWM", "RssAnon", "RssFile"):
                self.peaks[name] = max(self.peaks[name], int(rest.split()[0]) * 1024 / 1e9)


class Split:
    """Seconds spent in functions while they are watched. Calls inside a watched call count for the inner one alone."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.inside: list[float] = []

    def watch(self, owner: object, name: str, part: str) -> None:
        function = getattr(owner, name)

        def timed(*args: object, **kwargs: object) -> object:
            start = time.perf_counter()
            self.inside.append(0.0)
            try:
                return function(*args, **kwargs)
            finally:
                spent = time.perf_counter() - start
                self.seconds[part] += spent - self.inside.pop()
                if self.inside:
                    self.inside[-1] += spent

        setattr(owner, name, timed)


def measure(chosen: argparse.Namespace) -> dict[str, object]:
    import torch

    from anima_fast import encoder
    from anima_fast.bench.machine import describe
    from anima_fast.encoder import model, ssm

    start = time.perf_counter()
    with Memory() as memory:
        loaded = encoder.load(chosen.measure, chosen.recurrence, dtype=getattr(torch, chosen.dtype))
    result: dict[str, object] = {
        "machine": describe(),
        "settings": {name: value for name, value in vars(chosen).items() if name not in ("measure", "file", "json")},
        "info": {name: value for name, value in loaded.info().items() if name not in ("path", "config")},
        "load": {"seconds": time.perf_counter() - start, "peak_gb": dict(memory.peaks)},
    }
    split = Split()
    split.watch(model, "widen", "widening")
    split.watch(model.Linear, "forward", "matmuls")
    split.watch(model, "gated_delta_rule", "scan")
    split.watch(ssm, "ssd_chunk_scan", "scan")
    split.watch(ssm, "causal_conv1d", "conv")
    models = {"anima_fast": loaded.model}
    if chosen.recurrence == "gdn":
        tensors = {name.removeprefix("model."): t for name, t in loaded.model.state_dict().items()}  # the same memory
        models["transformers"] = model.TextEncoder(loaded.config, tensors, dtype=loaded.dtype, ops=False)
        split.watch(model.qwen, "torch_chunk_gated_delta_rule", "scan")
        split.watch(model.qwen, "causal_conv1d_fn", "conv")
    generator = torch.Generator().manual_seed(1)
    lengths = [int(length) for length in chosen.lengths.split(",")]
    prompts = {length: torch.randint(0, chosen.rows, (1, length), generator=generator) for length in lengths}
    samples: dict[tuple[int, str], list[dict[str, float]]] = defaultdict(list)
    peaks = {}
    with torch.inference_mode():
        for length, ids in prompts.items():  # also the warm-up
            with Memory() as memory:
                states = models["anima_fast"](ids)
            peaks[length] = dict(memory.peaks)
            if not states.isfinite().all():
                raise SystemExit(f"{length} tokens: states that are not finite")
            if "transformers" in models:
                error = float((models["transformers"](ids) - states).abs().max() / states.abs().max())
                print(f"{length} tokens: our ops and transformers' functions differ by {error:.1e} of the scale")
                result[f"difference_{length}"] = error
                if error > TOLERANCE and chosen.dtype == "float32":
                    raise SystemExit(f"more than {TOLERANCE}")
        for round_ in range(chosen.rounds):
            for length, ids in prompts.items():
                for name in sorted(models, reverse=bool(round_ % 2)):
                    split.seconds.clear()
                    start = time.perf_counter()
                    models[name](ids)
                    total = time.perf_counter() - start
                    parts = {part: split.seconds[part] for part in ("matmuls", "widening", "scan", "conv")}
                    parts["matmuls"] += parts["widening"]
                    rest = total - parts["matmuls"] - parts["scan"] - parts["conv"]
                    samples[length, name].append({"total": total, **parts, "rest": rest})
    result["lengths"] = {
        str(length): {
            "peak_gb": peaks[length],
            **{name: samples[length, name] for name in models},
        }
        for length in lengths
    }
    return result


def report(result: dict) -> None:
    machine, load = result["machine"], result["load"]
    print(f"\n{machine['cpu']}, {machine['cores']} cores, torch {machine['torch']}, commit {machine['commit']}")
    stored = ", ".join(f"{size / 1e9:.2f} GB {kind}" for kind, size in result["info"]["stored_bytes"].items())
    print(f"{result['info']['tensors']} tensors, {result['info']['parameters']:,} parameters: {stored}")
    memory = "peak: {RssAnon:.2f} GB anonymous, {RssFile:.2f} GB of files resident, {VmHWM:.2f} GB in all"
    print(f"load: {load['seconds']:.1f} s, {memory.format(**load['peak_gb'])}")
    for length, found in result["lengths"].items():
        print(f"\n{length} tokens, {memory.format(**found['peak_gb'])}")
        heads = ("total", "matmuls", "of it widening", "scan + conv", "rest")
        print(f"{'medians':14}" + "".join(f"{head:>24}" for head in heads))
        recurrent = {}
        for name in (name for name in found if name != "peak_gb"):
            rows = [{**row, "scan+conv": row["scan"] + row["conv"]} for row in found[name]]
            middle = {part: statistics.median(row[part] for row in rows) for part in rows[0]}
            recurrent[name] = middle["scan+conv"]
            parts = [middle[part] for part in ("total", "matmuls", "widening", "scan+conv", "rest")]
            cells = [f"{value:.3f} s ({100 * value / parts[0]:5.1f} %)" for value in parts]
            print(f"{name:14}" + "".join(f"{cell:>24}" for cell in cells))
        if len(recurrent) == 2:
            ratio = recurrent["transformers"] / recurrent["anima_fast"]
            print(f"scan + conv: {ratio:.1f} times as fast as transformers' torch functions")


def main() -> int:
    chosen = options()
    if chosen.measure:
        Path(chosen.json).write_text(json.dumps(measure(chosen), indent=1) + "\n", encoding="utf-8")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(chosen.file or Path(folder) / "encoder.safetensors")
        if not path.is_file():
            write_checkpoint(path, chosen)
        target = Path(chosen.json or Path(folder) / "result.json").resolve()
        code = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--measure", path, "--json", target]).returncode
        if not code:
            report(json.loads(target.read_text(encoding="utf-8")))
        return code


if __name__ == "__main__":
    sys.exit(main())
