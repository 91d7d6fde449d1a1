"""The command `anima-fast`: what its subcommands accept. What they do is in `commands/`, imported when one runs.

Exit codes: 0 done (warnings included), 1 a problem was found, 2 bad input (one line on stderr). With --json, stdout
holds one JSON document and nothing else.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from . import __version__
from .bench.cases import DTYPES, LAYOUTS, MODES
from .bench.scan_cases import OPS, SHAPES
from .encoder.adjust import ADVICE
from .errors import NoBackendError

__all__ = ["main"]

_RECURRENCE = "gdn: as the model was trained; mamba2: as its first node read it"
_HEAD_NORM = "the factor of the head's norm, exp(w) or 1 + w"
_FORCE = "use files that were fitted to the other recurrence"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; its exit code is returned (argparse exits by itself on --help and bad options)."""
    options = _parser().parse_args(argv)
    command = importlib.import_module(f".commands.{options.module}", __package__)
    try:
        return int(command.run(options))
    except (ValueError, TypeError, OSError, NoBackendError) as error:
        text = " ".join(str(error).split())
        print(f"anima-fast {options.command}: error: {text}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"anima-fast {options.command}: interrupted", file=sys.stderr)
        return 130


class _Parser(argparse.ArgumentParser):
    """One line for a bad option, without the usage that would bury it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def _size(text: str) -> tuple[int, int]:
    from .commands.regions import parse_size

    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"got {number}; allowed: a whole number >= 1")
    return number


_count.__name__ = "whole number"  # what argparse calls it in errors


def _factor(text: str) -> float:
    return float(text.lower().removesuffix("x"))


_factor.__name__ = "factor such as 2x"


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="anima-fast",
        description="Regional attention for the Anima image model, exact and fast.",
        epilog="example: anima-fast info",
    )
    parser.add_argument("--version", action="version", version=f"anima-fast {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)

    def command(name: str, summary: str, examples: str) -> argparse.ArgumentParser:
        return _add_command(commands, name, name, summary, examples)

    info = command(
        "info",
        "versions, devices, and each backend: usable, or the reason it is not",
        "example:\n  anima-fast info\n  anima-fast info --json",
    )
    _add_json(info)

    regions = command(
        "regions",
        "pictures and figures of how masks land on the model's tokens, and the plan as a file",
        "examples:\n"
        "  anima-fast regions examples/regions/portrait.json --out preview\n"
        "  anima-fast regions left.png right.png --size 832x1216 --out preview\n\n"
        "The region file's format is described in anima_fast/commands/regions.py and by examples/regions/*.json.",
    )
    regions.add_argument("files", nargs="+", metavar="FILE", help="one region file (.json), or one mask image a region")
    regions.add_argument(
        "--size", type=_size, metavar="WxH", help="picture size in pixels (default: the file's; the first mask's)"
    )
    regions.add_argument("--out", metavar="DIR", default="regions", help="where the pictures go (default: %(default)s)")
    _add_json(regions)

    _add_generate(commands)
    _add_batch(commands)
    _add_encoder(commands)
    _add_doctor(commands)

    bench = command(
        "bench",
        "measure every backend and every peer that is installed, each checked against fp64 before it is timed",
        "examples:\n"
        "  anima-fast bench attention --mode all --json out.json\n"
        "  anima-fast bench scan --lengths 77 512 --json out.json",
    )
    ops = bench.add_subparsers(dest="op", required=True, metavar="{attention,scan}", parser_class=_Parser)
    _add_bench_attention(ops)
    _add_bench_scan(ops)

    warmup = command(
        "warmup",
        "compile the Triton kernels that a model will need, so that its first call does not wait",
        "example:\n  anima-fast warmup --dtype bf16 fp16",
    )
    warmup.add_argument(
        "--dtype", nargs="+", choices=tuple(DTYPES), default=["bf16", "fp16"], help="default: bf16 fp16"
    )
    warmup.add_argument("--heads", type=_count, default=16, metavar="H", help="default: %(default)s, as Anima")
    warmup.add_argument("--head-dim", type=_count, default=128, metavar="D", help="default: %(default)s, as Anima")
    warmup.add_argument("--device", default="cuda", help="cuda, cuda:1 … (default: %(default)s)")
    _add_json(warmup)
    return parser


def _add_command(
    commands: argparse._SubParsersAction[_Parser], name: str, module: str, summary: str, examples: str
) -> argparse.ArgumentParser:
    """A command that is run by `commands/<module>.py`."""
    parser = commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(module=module)
    return parser


def _add_generate(commands: argparse._SubParsersAction[_Parser]) -> None:
    generate = _add_command(
        commands,
        "generate",
        "generate",
        "pictures with Anima by diffusers, with different prompts in different places",
        "examples:\n"
        '  anima-fast generate --prompt "a village street, evening" --region left.png="a red house" '
        '--region right.png="a tree" --out street.png\n'
        "  anima-fast generate --like street.png --seed 7 --out other.png\n"
        '  anima-fast generate --prompt "oil painting" --image photo.jpg --strength 0.5 --out painting.png\n'
        '  anima-fast generate --prompt "a city from above" --hires 4x --tiled --out city.png\n\n'
        "A picture holds all that made it, masks and image included: --like makes it again, and options beside\n"
        "--like change what they name. Sizes are multiples of 16.",
    )
    add = generate.add_argument
    add("--model", metavar="DIR|NAME", help="in diffusers' form (default: circlestone-labs/Anima-Base-v1.0-Diffusers)")
    add("--prompt", metavar="TEXT", help="what the whole picture shows: the base prompt of the regions")
    add("--negative", metavar="TEXT", help="what it must not show (default: nothing)")
    add("--region", action="append", metavar="MASK=TEXT", help="a mask image, white where TEXT counts; repeatable")
    add("--region-strength", nargs="+", type=float, metavar="X", help="one for each region (default: 1)")
    add(
        "--region-priority",
        nargs="+",
        type=float,
        metavar="X",
        help="one for each region: higher ones take their pixels from lower ones (default: 0)",
    )
    add("--plan", nargs="+", metavar="NAME=X", help="keywords of RegionPlan.from_masks: mode=hard, combine=blend …")
    add("--start", type=float, metavar="P", help="share of sampling where regions begin to act (default: 0)")
    add("--end", type=float, metavar="P", help="and where they stop (default: 1)")
    add("--outside", choices=("all", "base"), help="the prompts that count out of --start … --end (default: all)")
    add("--base", action=argparse.BooleanOptionalAction, help="--prompt counts among the regions (default: yes)")
    add("--size", type=_size, metavar="WxH", help="in pixels (default: 1024x1024; that of --image)")
    add("--steps", type=_count, metavar="N", help="default: 30")
    add(
        "--guidance", type=float, metavar="X", help="default: 4; 1 is without a negative prompt, as turbo LoRAs want it"
    )
    add("--shift", type=float, metavar="X", help="of the noise schedule (default: the model's, 3)")
    add("--seed", type=int, metavar="N", help="default: a new one, which is printed")
    add("--batch", type=_count, metavar="N", help="pictures at once, of seeds N, N + 1 … (default: 1)")
    add("--image", metavar="F", help="start from this picture and not from noise alone")
    add("--strength", type=float, metavar="X", help="how much of --image is made anew, 0 to 1 (default: 0.6)")
    add("--dtype", choices=tuple(DTYPES), help="default: bf16, on a CPU fp32")
    add("--device", help="cpu, cuda, cuda:1, mps … (default: a GPU if there is one)")
    large = generate.add_argument_group("large pictures (docs/high_resolution.md)").add_argument
    large("--hires", type=_factor, metavar="Nx", help="a second pass at N times --size, from the enlarged first one")
    large("--hires-denoise", type=float, metavar="X", help="how much of it is made anew, 0 to 1 (default: 0.5)")
    large("--tiled", action=argparse.BooleanOptionalAction, help="work on overlapping tiles (default: no)")
    large("--tile", type=_count, metavar="N", help="largest side of a tile in pixels (default: 1024)")
    large("--overlap", type=int, metavar="N", help="pixels that neighbours share (default: an eighth of --tile)")
    large("--attention-chunk", type=_count, metavar="N", help="tokens at once in self-attention (default: all)")
    text = generate.add_argument_group("another text encoder (docs/encoder.md)").add_argument
    text(
        "--encoder", metavar="FILE", help="the hybrid encoder, qwen35_4b.safetensors; stock: the model's own (default)"
    )
    text("--recurrence", choices=("gdn", "mamba2"), help=_RECURRENCE + " (default: gdn)")
    text("--head-norm", choices=("exp", "one_plus"), help=_HEAD_NORM + " (default: exp)")
    text("--encoder-tokenizer", metavar="DIR", help="of Qwen3.5 (default: beside FILE, else the hub's)")
    text("--alignment", metavar="F", help=ADVICE["alignment"])
    text("--alignment-strength", type=float, metavar="X", help=ADVICE["alignment_strength"] + " (default: 0.5)")
    text("--calibration", metavar="F", help=ADVICE["calibration"])
    text("--output-scale", type=float, metavar="X", help=ADVICE["output_scale"] + " (default: 1)")
    text("--force", action="store_true", default=None, help=_FORCE)
    add("--preview", type=_count, metavar="N", help="every N steps, show the first picture so far in OUT.preview.png")
    add("--like", metavar="F.png", help="repeat the request of a picture made here")
    add("--out", metavar="F.png", default="anima.png", help="default: %(default)s; a batch adds _2, _3 …")
    _add_json(generate)


def _add_batch(commands: argparse._SubParsersAction[_Parser]) -> None:
    batch = _add_command(
        commands,
        "batch",
        "batch",
        "thousands of pictures from a file of jobs; killed at any moment, the same command goes on",
        "examples:\n"
        "  anima-fast batch jobs.jsonl --out pictures\n"
        "  anima-fast batch jobs.jsonl --out pictures --dry-run\n"
        "  anima-fast batch jobs.jsonl --out pictures --workers 4 --batch-size 8\n"
        "  anima-fast batch jobs.jsonl --out pictures --engine ray --address ray://head:10001 --workers 8\n\n"
        "A job is a line of JSON with the fields of a request, of which only the prompt is required:\n"
        '  {"prompt": "a street", "seeds": [1, 2], "regions": [{"mask": "left.png", "prompt": "a red house"}]}\n'
        "All fields: docs/batch.md. Exit code 1: a job could not be painted; the others were.",
    )
    add = batch.add_argument
    add("jobs", metavar="JOBS.jsonl", help="one job a line; files that it names are beside it")
    add("--out", metavar="DIR", required=True, help="pictures, and journal.jsonl of what was done")
    add("--dry-run", action="store_true", help="check every job and show what would be painted; writes nothing")
    add("--batch-size", type=_count, default=4, metavar="N", help="pictures in one launch (default: %(default)s)")
    add("--workers", type=int, default=1, metavar="N", help="processes (default: %(default)s); 0: in this one")
    add("--threads", type=_count, metavar="N", help="of torch in each worker (default: the cores, divided)")
    add("--device", help="cpu, cuda, cuda:1, mps …; cuda: a GPU for each worker (default: a GPU if there is one)")
    add("--model", metavar="DIR|NAME", help="of jobs that name none")
    add("--dtype", choices=tuple(DTYPES), help="of jobs that name none (default: bf16, on a CPU fp32)")
    add("--engine", choices=("local", "ray"), default="local", help="default: %(default)s")
    add("--address", metavar="A", help="of a Ray cluster (default: one is started here)")
    _add_json(batch)


def _add_encoder(commands: argparse._SubParsersAction[_Parser]) -> None:
    encoder = _add_command(
        commands,
        "encoder",
        "encoder",
        "the hybrid text encoder: inspect, encode, align and calibrate it, judge what comes out",
        "examples:\n"
        "  anima-fast encoder inspect qwen35_4b.safetensors\n"
        "  anima-fast encoder report qwen35_4b.safetensors --prompts prompts.tsv --plot report.png\n"
        "  anima-fast encoder fit-alignment qwen35_4b.safetensors --target qwen_3_06b_base.safetensors "
        "--prompts prompts.tsv --out alignment.safetensors\n\n"
        "What the settings do and when to use them: docs/encoder.md.",
    )
    actions = encoder.add_subparsers(dest="action", required=True, metavar="ACTION", parser_class=_Parser)

    def action(name: str, summary: str, examples: str) -> argparse.ArgumentParser:
        parser = _add_command(actions, name, "encoder", summary, examples)
        parser.add_argument("file", metavar="FILE", help="the encoder: a safetensors file or a directory")
        return parser

    inspect = action(
        "inspect",
        "what an encoder, an alignment or a calibration file is, read and checked from end to end",
        "examples:\n  anima-fast encoder inspect qwen35_4b.safetensors\n"
        "  anima-fast encoder inspect alignment.safetensors --json",
    )
    inspect.add_argument("--config", metavar="F.json", help="what tensor shapes leave open (default: Qwen3.5's)")
    _add_json(inspect)

    encode = action(
        "encode",
        "the states of prompts, as Anima's adapter takes them, in a safetensors file",
        'examples:\n  anima-fast encoder encode qwen35_4b.safetensors --prompt "a red cat" --out cat.safetensors\n'
        "  anima-fast encoder encode qwen35_4b.safetensors --prompts prompts.txt --alignment alignment.safetensors "
        "--out states.safetensors",
    )
    _add_encoder_common(encode)
    _add_adjustment(encode)
    encode.add_argument("--out", metavar="F.safetensors", required=True, help="states [B, L, 1024] and mask [B, L]")
    _add_json(encode)

    alignment = action(
        "fit-alignment",
        "turn the encoder's directions into the stock encoder's; figures on prompts that were held out",
        "example:\n  anima-fast encoder fit-alignment qwen35_4b.safetensors --target qwen_3_06b_base.safetensors \\\n"
        "      --prompts prompts.tsv --out alignment.safetensors --plot alignment.png\n\n"
        "Take some thousands of prompts of the kinds you use: from fewer than 1,024 not every direction can be told.",
    )
    _add_encoder_common(alignment)
    _add_target(alignment, required=True)
    alignment.add_argument(
        "--reflections",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="allow a mirror image (default: yes, as the published one)",
    )
    alignment.add_argument(
        "--held-out", type=float, default=0.1, metavar="X", help="share that is only measured (default: %(default)s)"
    )
    alignment.add_argument("--out", metavar="F.safetensors", required=True, help="the alignment")
    _add_plot(alignment)
    _add_json(alignment)

    calibration = action(
        "fit-calibration",
        "a scale and a bias for each dimension, from the same prompts through both encoders",
        "example:\n  anima-fast encoder fit-calibration qwen35_4b.safetensors --target qwen_3_06b_base.safetensors "
        "\\\n      --prompts prompts.tsv --alignment alignment.safetensors --out calibration.safetensors",
    )
    _add_encoder_common(calibration)
    _add_target(calibration, required=True)
    calibration.add_argument("--alignment", metavar="F", help="the one that the calibration will be used with, if any")
    calibration.add_argument("--force", action="store_true", help="with an alignment of another recurrence")
    calibration.add_argument("--out", metavar="F.safetensors", required=True, help="the calibration")
    _add_json(calibration)

    report = action(
        "report",
        "figures that tell a healthy encoder from a broken one, for both recurrences and each step after the head",
        "examples:\n  anima-fast encoder report qwen35_4b.safetensors --prompts prompts.tsv --plot report.png\n"
        "  anima-fast encoder report qwen35_4b.safetensors --prompts prompts.tsv --recurrence gdn "
        "--alignment a.safetensors\n      --calibration c.safetensors --target qwen_3_06b_base.safetensors\n\n"
        "Exit code 1: the first recurrence has collapsed (all tokens, or all prompts, alike).",
    )
    _add_encoder_common(report, recurrences=True)
    _add_adjustment(report, several=True)
    _add_target(report, required=False)
    _add_plot(report)
    _add_json(report)

    sweep = action(
        "sweep",
        "the same prompts at several alignment strengths, side by side",
        "example:\n  anima-fast encoder sweep qwen35_4b.safetensors --prompts prompts.txt \\\n"
        "      --alignment alignment.safetensors --strengths 0 0.3 0.5 0.7 1 --plot sweep.png --out sweep.safetensors",
    )
    _add_encoder_common(sweep)
    _add_adjustment(sweep, strengths=True)
    _add_target(sweep, required=False)
    sweep.add_argument("--out", metavar="F.safetensors", help="also write states_off, states_0, states_0.3 … and mask")
    _add_plot(sweep)
    _add_json(sweep)


def _add_encoder_common(parser: argparse.ArgumentParser, *, recurrences: bool = False) -> None:
    add = parser.add_argument
    add("--prompts", metavar="F", help="one a line; or .csv/.tsv with the column prompt, and category if you like")
    add("--prompt", action="append", metavar="TEXT", help="instead of a file; repeatable")
    choices = ("gdn", "mamba2")
    if recurrences:
        add(
            "--recurrence",
            nargs="+",
            choices=choices,
            default=list(choices),
            help="which readings of the recurrent layers (default: both)",
        )
    else:
        add(
            "--recurrence",
            choices=choices,
            default="gdn",
            help=_RECURRENCE + " (default: %(default)s)",
        )
    add(
        "--head-norm",
        choices=("exp", "one_plus"),
        default="exp",
        help=_HEAD_NORM + " (default: %(default)s)",
    )
    add("--tokenizer", metavar="DIR", help="of Qwen3.5 (default: beside FILE, else the hub's)")
    add("--config", metavar="F.json", help="what tensor shapes leave open (default: Qwen3.5's)")
    add("--dtype", choices=tuple(DTYPES), help="what is computed in (default: bf16, on a CPU fp32)")
    add("--device", help="cpu, cuda, cuda:1, mps … (default: a GPU if there is one)")


def _add_adjustment(parser: argparse.ArgumentParser, *, several: bool = False, strengths: bool = False) -> None:
    """What follows the head, with the words of docs/encoder.md."""
    add = parser.add_argument
    many: dict[str, Any] = dict(nargs="+", default=[]) if several else {}
    each = "; one for each recurrence" if several else ""
    add("--alignment", metavar="F", required=strengths, help=ADVICE["alignment"] + each, **many)
    if strengths:
        add(
            "--strengths",
            nargs="+",
            type=float,
            default=[0.0, 0.3, 0.5, 0.7, 1.0],
            metavar="X",
            help="default: 0 0.3 0.5 0.7 1",
        )
    else:
        add(
            "--alignment-strength",
            type=float,
            default=0.5,
            metavar="X",
            help=ADVICE["alignment_strength"] + " (default: %(default)s)",
        )
    add("--calibration", metavar="F", help=ADVICE["calibration"] + each, **many)
    add("--output-scale", type=float, default=1.0, metavar="X", help=ADVICE["output_scale"] + " (default: %(default)s)")
    add("--force", action="store_true", help=_FORCE)


def _add_target(parser: argparse.ArgumentParser, *, required: bool) -> None:
    parser.add_argument(
        "--target",
        metavar="F|DIR",
        required=required,
        help="the stock encoder, Qwen3-0.6B: ComfyUI's file or the hub's directory",
    )
    parser.add_argument(
        "--target-tokenizer", metavar="DIR", help="of Qwen3 (default: beside it, ComfyUI's, else the hub's)"
    )


def _add_plot(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--plot", metavar="F.png", help="draw it (needs matplotlib)")


def _add_doctor(commands: argparse._SubParsersAction[_Parser]) -> None:
    doctor = _add_command(
        commands,
        "doctor",
        "doctor",
        "what is wrong with a ComfyUI workflow, by evidence",
        "examples:\n"
        "  anima-fast doctor workflow.json\n"
        "  anima-fast doctor picture.png --models ComfyUI/models --picture path.svg\n"
        "  anima-fast doctor workflow.json --fix fixed.json\n"
        "  anima-fast doctor workflow.json --comfyui http://127.0.0.1:8188 --ablate --report report.html\n\n"
        "Exit code 0: nothing, or notes. 1: errors or warnings (with --fix, those that are left). 2: not readable.\n"
        "What each finding means: docs/doctor.md.",
    )
    add = doctor.add_argument
    add("workflow", metavar="WORKFLOW", help="a workflow of the user interface or of its API export, or a PNG with one")
    add("--png", metavar="IMAGE", help="the picture it made: its size is compared")
    add("--models", metavar="DIR", help="ComfyUI's models folder: files are recognized by their headers")
    add("--fix", metavar="OUT.json", help="write the corrected workflow; what is not wrong stays as it is")
    add("--picture", metavar="OUT", help="draw the model's way with the findings on it (.svg or .png)")
    add("--comfyui", metavar="URL", help="ask this server what it is and has; nothing is run on it")
    add("--submit", action="store_true", help="with --comfyui: queue the workflow and follow it to its pictures")
    add(
        "--ablate",
        action="store_true",
        help="with --comfyui or --model: run the decision tree, a picture for each test, and name the fault: minutes "
        "on a GPU",
    )
    add("--model", metavar="DIR", help="with --ablate: on this model in diffusers' form, not on a server")
    add("--all-tests", action="store_true", help="with --ablate: also tests that the verdict does not need")
    add("--baseline-size", type=_size, metavar="WxH", help="with --ablate: of the official baseline (1024x1024)")
    add("--baseline-steps", type=_count, metavar="N", help="with --ablate: of the official baseline (30)")
    add(
        "--baseline-prompt",
        metavar="TEXT",
        help="with --ablate: of the official baseline, for a model that knows few words",
    )
    add("--report", metavar="OUT", help="with --ablate: findings and tests with their pictures, as .html or .md")
    add("--timeout", type=float, default=30.0, metavar="S", help="of one answer of the server (default: %(default)g s)")
    _add_json(doctor)


def _add_bench_attention(ops: argparse._SubParsersAction[_Parser]) -> None:
    bench = _add_command(
        ops,
        "attention",
        "bench",
        "regional attention: every backend and every peer that is installed, each checked before it is timed",
        "examples:\n"
        "  anima-fast bench attention\n"
        "  anima-fast bench attention --mode all --size 1024x1024 --size 2048x2048 --json out.json --plot out.png\n"
        "  anima-fast bench attention --backends cpu torch --peers stock --mode hard --layout halves",
    )
    bench.add_argument(
        "--size", type=_size, action="append", metavar="WxH", help="picture size; repeatable (default: 1024x1024)"
    )
    bench.add_argument(
        "--mode", choices=(*MODES, "all"), default="soft_log", help="what to compute (default: %(default)s)"
    )
    bench.add_argument("--layout", choices=tuple(LAYOUTS), default="quadrants", help="default: %(default)s")
    bench.add_argument("--regions", type=_count, metavar="N", help="circles: how many (default: 8)")
    bench.add_argument("--tokens", type=_count, default=77, metavar="N", help="tokens a prompt (default: %(default)s)")
    bench.add_argument(
        "--pad-to", type=_count, default=512, metavar="N", help="rows a padded prompt has (default: %(default)s)"
    )
    bench.add_argument("--heads", type=_count, default=16, metavar="H", help="default: %(default)s")
    bench.add_argument("--head-dim", type=_count, default=128, metavar="D", help="default: %(default)s")
    bench.add_argument("--dtype", choices=tuple(DTYPES), default="fp32", help="default: %(default)s")
    _add_bench_common(bench)
    bench.add_argument("--plot", metavar="F.png", help="draw times and memory (needs matplotlib)")


def _add_bench_scan(ops: argparse._SubParsersAction[_Parser]) -> None:
    bench = _add_command(
        ops,
        "scan",
        "bench_scan",
        "Mamba2, gated delta rule and their convolution: sequences and single tokens, long sequences, whole models",
        "examples:\n"
        "  anima-fast bench scan\n"
        "  anima-fast bench scan --ops ssd_chunk_scan --shapes all --lengths 77 1024 8192 --json out.json\n"
        "  anima-fast bench scan --ops gated_delta_rule --shapes qwen3.5-4b delta:8,128,128,4 --lengths 512\n"
        "  anima-fast bench scan --linear\n"
        "  anima-fast bench scan --models --rounds 5",
    )
    bench.add_argument("--ops", nargs="+", choices=tuple(OPS), default=list(OPS), metavar="OP", help="default: all")
    bench.add_argument(
        "--shapes",
        nargs="+",
        metavar="SHAPE",
        help=f"all, {', '.join(SHAPES)}, ssd:H,P,N,G or delta:Hv,V,K,Hk (default: one of each kind)",
    )
    bench.add_argument(
        "--lengths",
        nargs="+",
        type=_count,
        metavar="L",
        help="tokens (default: 77 512 1024; --models: 77 512; --linear: 1024 to 65536, times 4)",
    )
    bench.add_argument("--no-final-state", action="store_true", help="scans do not return their last state")
    mode = bench.add_mutually_exclusive_group()
    mode.add_argument("--linear", action="store_true", help="instead: time and memory a token as L grows, few heads")
    mode.add_argument(
        "--models", action="store_true", help="instead: tokens/s of transformers' models, with anima_fast and without"
    )
    bench.add_argument("--dtype", choices=tuple(DTYPES), default="fp32", help="default: %(default)s")
    _add_bench_common(bench)


def _add_bench_common(bench: argparse.ArgumentParser) -> None:
    bench.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 … (default: %(default)s)")
    bench.add_argument(
        "--rounds", type=_count, default=10, metavar="N", help="timed calls of each (default: %(default)s)"
    )
    bench.add_argument(
        "--backends", nargs="*", metavar="NAME", help="only these (default: all but reference, which is the oracle)"
    )
    bench.add_argument("--peers", nargs="*", metavar="NAME", help="only these, or none if empty (default: all)")
    bench.add_argument(
        "--json", nargs="?", const="-", metavar="F", help="write all samples to F; without F to stdout, and no table"
    )


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout and nothing else")


if __name__ == "__main__":
    sys.exit(main())
