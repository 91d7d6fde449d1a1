"""`anima-fast encoder`: look at an encoder's files, encode prompts, fit and judge alignments and calibrations.

inspect           a checkpoint, an alignment or a calibration: what it is, before anything is loaded
encode            prompts to a safetensors file
fit-alignment     against the stock encoder, with figures on held-out prompts
fit-calibration   the same prompts, after the alignment it will be used with
report            the diagnostics of docs/encoder.md, for both recurrences and each step
sweep             one encoder at several alignment strengths
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import json
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..bench.cases import DTYPES
from ..encoder.adjust import Adjustment
from ..encoder.alignment import Alignment, AlignmentFit
from ..encoder.calibration import Calibration, CalibrationFit
from ..encoder.checkpoint import read_checkpoint
from ..encoder.diagnostics import Diagnostics, draw, draw_alignment, pool, rows_of_table
from ..encoder.encoder import load
from ..encoder.files import Origin
from ..encoder.head import norm_report
from ..encoder.prompt_file import Prompts, read_prompts
from ..encoder.target import Target, load_target
from ..errors import invalid
from ..files import write_atomic
from .bench import check_device, default_device, pyplot, text_columns

if TYPE_CHECKING:
    from ..encoder.encoder import Encoder

__all__ = ["run"]

#: Prompts that are encoded between two updates of the sums and of the progress bar.
_CHUNK = 32

#: Below this diversity of tokens, or above this similarity of prompts, an encoder says the same whatever it is told.
_COLLAPSED_TOKENS, _COLLAPSED_PROMPTS = 0.05, 0.99

#: Of the held-out centred cosine: below it an alignment found nothing that the two encoders share.
_NOTHING_SHARED = 0.1


def run(options: argparse.Namespace) -> int:
    """Exit code 1: the vectors are not finite, an encoder has collapsed, or an alignment found nothing."""
    action = {
        "inspect": _inspect,
        "encode": _encode,
        "fit-alignment": _fit_alignment,
        "fit-calibration": _fit_calibration,
        "report": _report,
        "sweep": _sweep,
    }[options.action]
    if options.action != "inspect" and not _has_transformers():
        raise ValueError("transformers is not installed: pip install 'anima-fast[transformers]'")
    with warnings.catch_warnings(record=True) as caught, _quiet():
        warnings.simplefilter("always", UserWarning)
        try:
            report, lines, problems = action(options)
        except FloatingPointError as error:
            print(f"anima-fast encoder: {error}", file=sys.stderr)
            return 1
    notes = list(dict.fromkeys(str(w.message) for w in caught if issubclass(w.category, UserWarning)))
    if options.json:
        print(json.dumps(report | {"warnings": notes, "problems": problems}, indent=1))
    else:
        print("\n".join(lines))
        for note in notes:
            print(f"anima-fast encoder: warning: {note}", file=sys.stderr)
    for problem in problems:
        print(f"anima-fast encoder: {problem}", file=sys.stderr)
    return 1 if problems else 0


_Outcome = tuple[dict[str, Any], list[str], list[str]]  # JSON, lines of text, problems


# ------------------------------------------------------------------------------------------------------- inspect


def _inspect(options: argparse.Namespace) -> _Outcome:
    from safetensors import SafetensorError, safe_open

    path = Path(options.file)
    names: set[str] = set()
    if path.is_file():
        with contextlib.suppress(SafetensorError, OSError), safe_open(path, framework="pt") as file:
            names = set(file.keys())  # what cannot be read is said by those who read it
    if "rotation" in names:
        return _inspect_alignment(path)
    if {"scale", "bias"} & names:
        return _inspect_calibration(path)
    return _inspect_encoder(options)


def _inspect_encoder(options: argparse.Namespace) -> _Outcome:
    found = read_checkpoint(options.file, _config(options))
    config = found.config
    bytes_of: dict[str, int] = {}
    for tensor in found.tensors.values():
        kind = str(tensor.dtype).removeprefix("torch.")
        bytes_of[kind] = bytes_of.get(kind, 0) + tensor.nbytes
    head = found.tensors.get("norm.1.weight")
    norm = None if head is None else norm_report(head)
    parameters = sum(tensor.numel() for tensor in found.tensors.values())
    report = {
        "kind": "encoder",
        "file": str(found.path),
        "hash": found.hash,
        "prefix": found.prefix,
        "tensors": len(found.tensors),
        "parameters": parameters,
        "stored_bytes": bytes_of,
        "config": {**vars(config), "layer_types": list(config.layer_types)},
        "norm": norm,
        "metadata": found.metadata,
        "other_parts": list(found.other_parts),
    }
    recurrent = sum(kind == "linear_attention" for kind in config.layer_types)
    lines = [
        f"{found.path}: a text encoder of {config.num_hidden_layers} layers, {recurrent} of them recurrent; "
        f"{config.hidden_size} wide, output {config.output_size}",
        f"  {len(found.tensors)} tensors, {parameters:,} parameters, all finite; "
        + ", ".join(f"{size / 1e9:.3g} GB of {kind}" for kind, size in sorted(bytes_of.items())),
        f"  {config.vocab_size} rows of embeddings; names' prefix: {found.prefix or 'none'}; hash {found.hash[:16]}",
    ]
    if norm is None:
        lines.append("  no head: the output is that of the last norm")
    else:
        lines.append(
            f"  norm of the head: weights around {norm['mean']:.4g}, at most {norm['max_abs']:.3g} from 0; "
            f"exp(w) and 1 + w differ by at most {norm['difference']:.2g}"
        )
    if found.other_parts:
        lines.append(f"  {len(found.other_parts)} tensors of other parts of the model, not used")
    return report, lines, []


def _inspect_alignment(path: Path) -> _Outcome:
    found = Alignment.load(path)
    rotation = found.rotation.double()
    error = float((rotation @ rotation.T - torch.eye(len(rotation), dtype=torch.float64)).abs().max())
    report = {
        "kind": "alignment",
        "file": str(path),
        "origin": vars(found.origin),
        "width": len(rotation),
        "determinant": found.determinant,
        "orthogonality_error": error,
        "source_mean_norm": float(found.source_mean.norm()),
        "target_mean_norm": float(found.target_mean.norm()),
        "fit": found.report,
    }
    lines = [
        f"{path}: an alignment of {len(rotation)} dimensions, {_origin_text(found.origin)}",
        f"  determinant {found.determinant:+d}, orthogonal to {error:.1e}; lengths of the means: source "
        f"{report['source_mean_norm']:.4g}, target {report['target_mean_norm']:.4g}",
    ]
    return report, lines + (_alignment_lines(found.report) if found.report else []), []


def _inspect_calibration(path: Path) -> _Outcome:
    found = Calibration.load(path)
    scale = found.scale
    report = {
        "kind": "calibration",
        "file": str(path),
        "origin": vars(found.origin),
        "width": len(scale),
        "scale": {"min": float(scale.min()), "mean": float(scale.mean()), "max": float(scale.max())},
        "bias_mean": float(found.bias.mean()),
        "after_an_alignment": found.rotated_std is not None,
        "fit": found.report,
    }
    after = "with statistics after an alignment" if found.rotated_std is not None else "of vectors before any alignment"
    lines = [
        f"{path}: a calibration of {len(scale)} dimensions, {after}, {_origin_text(found.origin)}",
        f"  scale {float(scale.min()):.4g} to {float(scale.max()):.4g}, mean {float(scale.mean()):.4g}; "
        f"mean bias {report['bias_mean']:.4g}",
    ]
    return report, lines, []


def _origin_text(origin: Origin) -> str:
    if origin == Origin():
        return "not known of which encoder"
    text = f"of {origin.recurrence or 'an unknown recurrence'}, head norm {origin.head_norm or 'unknown'}"
    text += f", encoder {origin.encoder[:16]}" if origin.encoder else ""
    return text + (f", {origin.prompts} prompts" if origin.prompts else "")


# -------------------------------------------------------------------------------------------------------- encode


def _encode(options: argparse.Namespace) -> _Outcome:
    prompts = _prompts(options)
    out = _check_out(options.out)
    encoder = _load(options, options.recurrence, adjusted=True)
    states, mask = encoder.encode(list(prompts.texts))
    _check_finite(states, encoder)
    _write_states(out, {"states": states}, mask, prompts, encoder)
    rows = [["", "tokens", "mean", "std", "L2 per token"]]
    entries = []
    for i, text in enumerate(prompts.texts):
        real = states[i, mask[i]].double()
        entry = {
            "prompt": text,
            "tokens": len(real),
            "mean": float(real.mean()),
            "std": float(real.std(correction=0)),
            "l2_per_token": float(real.norm(dim=1).mean()),
        }
        entries.append(entry)
        rows.append([_short(text), str(len(real)), *(f"{entry[k]:.4g}" for k in ("mean", "std", "l2_per_token"))])
    report = {"file": str(out), "shape": list(states.shape), "encoder": encoder.info(), "prompts": entries}
    shape = " x ".join(map(str, states.shape))
    return report, [*text_columns(rows), f"written to {out}: states {shape} and mask"], []


# ---------------------------------------------------------------------------------------------------------- fits


def _fit_alignment(options: argparse.Namespace) -> _Outcome:
    prompts = _prompts(options)
    out = _check_out(options.out)
    plot = pyplot() if options.plot else None
    encoder, target = _load(options, options.recurrence), _load_target(options)
    _same_width(encoder, target)
    categories = dict(zip(prompts.texts, prompts.categories, strict=True)) if prompts.categories else None
    fit = AlignmentFit(target.width, held_out=options.held_out)
    for chunk in _chunks(prompts.texts, "encoding"):
        source, wanted = (_finite(*side) for side in (encoder.raw(chunk), target.encode(chunk)))
        fit.add(pool(*source), pool(*wanted), [categories[text] for text in chunk] if categories else None)
    origin = Origin(encoder.recurrence, encoder.head_norm, encoder.hash, target.hash)
    found = fit.finish(reflections=options.reflections, origin=origin)
    found.save(out)
    lines = [f"{_origin_text(found.origin)}: determinant {found.determinant:+d}", *_alignment_lines(found.report)]
    problems = []
    centred = (found.report.get("centred_after") or {}).get("mean")
    if centred is not None and centred < _NOTHING_SHARED:
        problems.append(
            f"the alignment found next to nothing that both encoders share: centred cosine {centred:.3f} on held-out "
            "prompts"
        )
    report = {"file": str(out), "origin": vars(found.origin), "fit": found.report} | _repeats(prompts)
    if plot is not None:
        if "after" not in found.report:
            raise invalid("--plot", "no held-out prompts", "--held-out above 0 and enough prompts")
        draw_alignment(found.report, options.plot, pyplot=plot, title=_origin_text(found.origin))
        lines.append(f"drawn in {options.plot}")
    return report, [*lines, f"written to {out}"], problems


def _alignment_lines(report: Mapping[str, Any]) -> list[str]:
    lines = [
        f"  {report['fitted']} prompts fitted, rank {report['rank']} of {report['width']}; "
        f"R2 of these {report['r2_fitted']:.3f} (with the best scale, {report['best_scale']:.3g}: "
        f"{report['r2_scaled_fitted']:.3f})"
    ]
    if "after" not in report:
        return [*lines, "  no prompt was held out: nothing is known of others"]
    measures = ("before", "after", "of_mean", "centred_before", "centred_after")
    rows = [["", "before", "after", "the mean alone", "centred before", "centred after"]]
    for key in ("mean", "min"):
        rows.append([f"cosine, {key}", *(f"{report[measure][key]:.3f}" for measure in measures)])
    for name, entry in (report.get("categories") or {}).items():
        rows.append([f"  {name or 'none'} ({entry['held_out']})", *(f"{entry[measure]:.3f}" for measure in measures)])
    lines += [f"  {report['held_out']} held-out prompts, at strength 1:", *text_columns(rows)]
    if report["r2"] is not None:
        lines.append(f"  R2 of these {report['r2']:.3f} (with that scale: {report['r2_scaled']:.3f})")
    return lines


def _fit_calibration(options: argparse.Namespace) -> _Outcome:
    prompts = _prompts(options)
    out = _check_out(options.out)
    encoder, target = _load(options, options.recurrence), _load_target(options)
    _same_width(encoder, target)
    alignment = None
    if options.alignment:
        alignment = _adjustment(encoder, options, options.alignment).alignment
    fit = CalibrationFit(target.width, alignment=alignment)
    for chunk in _chunks(prompts.texts, "encoding"):
        (states, mask), (wanted, real) = (_finite(*side) for side in (encoder.raw(chunk), target.encode(chunk)))
        fit.add(states[mask], wanted[real])
    origin = Origin(encoder.recurrence, encoder.head_norm, encoder.hash, target.hash, len(prompts.texts))
    found = fit.finish(origin=origin)
    found.save(out)
    report = {"file": str(out), "origin": vars(origin), "fit": found.report} | _repeats(prompts)
    lines = [
        f"{_origin_text(origin)}: {found.report['source_tokens']} tokens, of the target {found.report['target_tokens']}"
    ]
    for key, name in (("scale", "scale"), ("scale_rotated", "scale after the alignment")):
        if key in found.report:
            values = found.report[key]
            lines.append(f"  {name} {values['min']:.4g} to {values['max']:.4g}, mean {values['mean']:.4g}")
    return report, [*lines, f"written to {out}"], []


# ------------------------------------------------------------------------------------------------ report and sweep


class _Collected:
    """Diagnostics by name, and the mean-pooled vectors that are compared with the target's."""

    def __init__(self) -> None:
        self.diagnostics: dict[str, Diagnostics] = {}
        self.pooled: dict[str, list[torch.Tensor]] = {}

    def add(self, name: str, states: torch.Tensor, mask: torch.Tensor) -> None:
        self.diagnostics.setdefault(name, Diagnostics(states.shape[2])).add(states, mask)
        self.pooled.setdefault(name, []).append(pool(states, mask).float().cpu())

    def results(self) -> dict[str, dict[str, Any]]:
        results = {name: found.result() for name, found in self.diagnostics.items()}
        if "target" in results:
            goal = torch.cat(self.pooled["target"])
            cosine = torch.nn.functional.cosine_similarity
            for name, result in results.items():
                if name != "target":
                    own = torch.cat(self.pooled[name])
                    result["cosine_with_target"] = float(cosine(own, goal, dim=1).mean())
                    centred = cosine(own - own.mean(dim=0), goal - goal.mean(dim=0), dim=1)
                    result["centred_cosine_with_target"] = float(centred.mean()) if len(own) > 1 else None
        return results


def _report(options: argparse.Namespace) -> _Outcome:
    prompts = _prompts(options)
    plot = pyplot() if options.plot else None
    alignments = _by_recurrence("--alignment", [Alignment.load(file) for file in options.alignment], options)
    calibrations = _by_recurrence("--calibration", [Calibration.load(file) for file in options.calibration], options)
    collected = _Collected()
    first_stage: dict[str, str] = {}
    for recurrence in dict.fromkeys(options.recurrence):
        encoder = _load(options, recurrence)
        adjustment = _adjustment(
            encoder,
            options,
            alignments.get(recurrence),
            options.alignment_strength,
            calibrations.get(recurrence),
            options.output_scale,
        )
        for chunk in _chunks(prompts.texts, recurrence):
            states, mask = _finite(*encoder.raw(chunk))
            for stage, found in adjustment.stages(states).items():
                collected.add(f"{recurrence} {stage}", found, mask)
                first_stage.setdefault(recurrence, f"{recurrence} {stage}")
        info = encoder.info()
        del encoder
    target = _load_target(options) if options.target else None
    if target is not None:
        for chunk in _chunks(prompts.texts, "target"):
            collected.add("target", *_finite(*target.encode(chunk)))
    title = f"{Path(options.file).name}, {len(prompts.texts)} prompts, head norm {options.head_norm}"
    return _show(options, collected, {"encoder": info} | _repeats(prompts), title, plot, list(first_stage.values())[:1])


def _sweep(options: argparse.Namespace) -> _Outcome:
    prompts = _prompts(options)
    plot = pyplot() if options.plot else None
    out = _check_out(options.out) if options.out else None
    encoder = _load(options, options.recurrence)
    alignment = Alignment.load(options.alignment)
    calibration = Calibration.load(options.calibration) if options.calibration else None
    steps = {
        f"{strength:g}": _adjustment(encoder, options, alignment, strength, calibration, options.output_scale)
        for strength in options.strengths
    }
    collected = _Collected()
    if out is not None:
        raw, mask = _finite(*encoder.raw(list(prompts.texts)))
        states = {f"states_{name}": torch.where(mask[..., None], step(raw), 0.0) for name, step in steps.items()}
        _write_states(out, {"states_off": raw} | states, mask, prompts, encoder)
    for chunk in _chunks(prompts.texts, "encoding"):
        raw, mask = _finite(*encoder.raw(chunk))
        collected.add("off", raw, mask)
        for name, step in steps.items():
            collected.add(name, step(raw), mask)
    if options.target:
        target = _load_target(options)
        _same_width(encoder, target)
        for chunk in _chunks(prompts.texts, "target"):
            collected.add("target", *_finite(*target.encode(chunk)))
    title = f"{Path(options.file).name}, {encoder.recurrence}, {len(prompts.texts)} prompts, by alignment strength"
    report = {"encoder": encoder.info(), "file": None if out is None else str(out)} | _repeats(prompts)
    report, lines, problems = _show(options, collected, report, title, plot, ["off"])
    return report, lines + ([f"written to {out}"] if out is not None else []), problems


def _show(
    options: argparse.Namespace, collected: _Collected, report: dict[str, Any], title: str, plot: Any, judged: list[str]
) -> _Outcome:
    results = collected.results()
    lines = [title, *text_columns(rows_of_table(results, results.get("target")))]
    if plot is not None:
        draw(results, options.plot, pyplot=plot, title=title)
        lines.append(f"drawn in {options.plot}")
    problems = []
    for name in judged:
        diversity, similarity = (results[name][key] for key in ("token_diversity", "cross_prompt_similarity"))
        if diversity is not None and diversity < _COLLAPSED_TOKENS:
            problems.append(f"{name}: collapsed: the tokens of a prompt are all alike (diversity {diversity:.3f})")
        if similarity is not None and similarity > _COLLAPSED_PROMPTS:
            problems.append(f"{name}: collapsed: all prompts are alike (similarity {similarity:.3f})")
    return report | {"results": results}, lines, problems


def _by_recurrence(option: str, found: list[Any], options: argparse.Namespace) -> dict[str, Any]:
    """Which of the files goes to which recurrence; one that does not say, or is forced, to the first in the list."""
    chosen: dict[str, Any] = {}
    for part in found:
        name = part.origin.recurrence or options.recurrence[0]
        if options.force and name not in options.recurrence:
            name = options.recurrence[0]
        if name in chosen:
            raise invalid(option, f"two files for {name}", "one for each recurrence")
        if name not in options.recurrence:
            raise invalid(
                option, f"a file fitted to recurrence={name!r}", f"--recurrence {' '.join(options.recurrence)}"
            )
        chosen[name] = part
    return chosen


# -------------------------------------------------------------------------------------------------------- helpers


def _prompts(options: argparse.Namespace) -> Prompts:
    if options.prompts and options.prompt:
        raise invalid("--prompts, --prompt", "both", "one of them")
    if options.prompts:
        return read_prompts(options.prompts)
    if not options.prompt:
        raise invalid("--prompts", "nothing", "a file with prompts, or --prompt TEXT")
    return Prompts(tuple(dict.fromkeys(options.prompt)))


def _repeats(prompts: Prompts) -> dict[str, int]:
    if prompts.repeated:
        warnings.warn(f"{prompts.repeated} prompts were there more than once and count once", stacklevel=2)
    return {"prompts": len(prompts.texts), "repeated_prompts": prompts.repeated}


def _config(options: argparse.Namespace) -> Any:
    if not options.config:
        return None
    try:
        return json.loads(Path(options.config).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise invalid("--config", f"{options.config!r}, which is no JSON ({error})", "a config.json") from error


def _load(options: argparse.Namespace, recurrence: str, *, adjusted: bool = False) -> Encoder:
    device = check_device(options.device or default_device())
    further: dict[str, Any] = {}
    if adjusted:
        further = dict(
            alignment=options.alignment,
            alignment_strength=options.alignment_strength,
            calibration=options.calibration,
            output_scale=options.output_scale,
            force=options.force,
        )
    return load(
        options.file,
        recurrence,
        options.head_norm,
        device,
        DTYPES[options.dtype or ("fp32" if torch.device(device).type == "cpu" else "bf16")],
        _config(options),
        options.tokenizer,
        **further,
    )


def _adjustment(encoder: Encoder, options: argparse.Namespace, *settings: Any) -> Adjustment:
    return Adjustment.read(
        *settings,
        recurrence=encoder.recurrence,
        head_norm=encoder.head_norm,
        encoder_hash=encoder.hash,
        width=encoder.config.output_size,
        force=options.force,
    )


def _load_target(options: argparse.Namespace) -> Target:
    device = check_device(options.device or default_device())
    return load_target(options.target, tokenizer=options.target_tokenizer, device=device)


def _same_width(encoder: Encoder, target: Target) -> None:
    if encoder.config.output_size != target.width:
        raise invalid("--target", f"{target.width} dimensions", f"{encoder.config.output_size}, those of the encoder")


def _finite(states: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    _check_finite(states, None)
    return states, mask


def _check_finite(states: torch.Tensor, encoder: Encoder | None) -> None:
    if not bool(torch.isfinite(states).all()):
        kind = "" if encoder is None else f" in {encoder.dtype}".replace("torch.", "")
        raise FloatingPointError(f"the encoder gave values that are not finite{kind}; try --dtype bf16 or fp32")


def _chunks(texts: Sequence[str], name: str) -> Iterator[list[str]]:
    """Prompts of similar length together, with a progress bar on a terminal."""
    from tqdm import tqdm

    ordered = sorted(texts, key=len)
    with tqdm(total=len(texts), desc=name, unit="prompt", file=sys.stderr, disable=not sys.stderr.isatty()) as bar:
        for start in range(0, len(ordered), _CHUNK):
            chunk = ordered[start : start + _CHUNK]
            yield chunk
            bar.update(len(chunk))


def _check_out(out: str) -> Path:
    path = Path(out)
    if path.suffix.lower() != ".safetensors":
        raise invalid("--out", repr(out), "a file name that ends in .safetensors")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"--out: the directory {str(path.parent)!r} does not exist")
    return path


def _write_states(
    out: Path, states: Mapping[str, torch.Tensor], mask: torch.Tensor, prompts: Prompts, encoder: Encoder
) -> None:
    from safetensors.torch import save

    metadata = {
        "format": "anima_fast.states",
        "recurrence": encoder.recurrence,
        "head_norm": encoder.head_norm,
        "encoder": encoder.hash,
        "prompts": json.dumps(prompts.texts),
    }
    tensors = {name: tensor.cpu().contiguous() for name, tensor in states.items()} | {"mask": mask.cpu().contiguous()}
    write_atomic(out, save(tensors, metadata))


def _short(text: str) -> str:
    one_line = " ".join(text.split())
    return one_line if len(one_line) <= 48 else one_line[:47] + "…"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' notices and bars, which are not about the user's files."""
    logging = importlib.import_module("transformers.utils.logging") if _has_transformers() else None
    if logging is None:
        yield
        return
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


def _has_transformers() -> bool:
    return importlib.util.find_spec("transformers") is not None
