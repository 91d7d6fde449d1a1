"""From the measured table of the tests to the fault line, or to what is missing to draw it. Pure: no input, no output.

The tree (a test "works" if its result is a picture, "fails" if it is noise or blank, or unclear but by the slope of the
spectrum nearer to noise than to the baseline's picture):

    workflow works ------------------------------------------------- nothing to find
    baseline fails ------------------------------------------------- model_stack: files, or the server itself
      but the baseline with the workflow's own files works --------- (go on: the official files are the broken ones)
    baseline works, with the workflow's own files it fails --------- files
    first pass works ----------------------------------------------- later_pass: what comes after the first sampler
    regions off works: zero strength works ------------------------- regions: masks on the token grid, token ranges
                       zero strength fails: attention off works ---- attention_conflict: another node's attention
                                            attention off fails ---- override: the hook itself in this server
    regions off fails: sampling | sampler | resolution works ------- that one (the least change, in this order)
                       none alone, all together work --------------- combination
                       nor together, without other patches works --- patches
                       nor that ------------------------------------ undecided: what is left is named
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from .measure import Measures
from .measure import to_json as measures_to_json

__all__ = ["TESTS", "Row", "Verdict", "verdict"]

#: Every test in the order of running, with what it does, in the words of the report.
TESTS: dict[str, str] = {
    "baseline": "step zero: the official graph with official files, nothing of the workflow",
    "files": "the official graph with the workflow's own files",
    "workflow": "the workflow as it is, to its last picture",
    "first_pass": "the workflow as it is, up to its first sampler",
    "regions_off": "A: regions off",
    "zero_strength": "A: regions on at strength zero",
    "sampling": "B: regions off, sampling shift 3.0 on the model",
    "sampler": "C: regions off, the official sampler settings",
    "resolution": "D: regions off, one megapixel",
    "matched": "B, C and D together",
    "shapes": "E: shapes logged",
    "attention_off": "F: regions on, other patches of the model removed, PyTorch's attention",
    "plain": "F: regions off and other patches removed, with B, C and D",
}


@dataclasses.dataclass(frozen=True)
class Row:
    """A test's outcome. `status`: "measured", "failed" (an error, in `why`), "skipped" (there is nothing to change,
    in `why`; its result would be that of `same_as`, if given)."""

    test: str
    status: str
    measures: Measures | None = None
    why: str | None = None
    same_as: str | None = None
    changes: tuple[str, ...] = ()
    difference: float | None = None  # root mean square from the workflow's own (first) picture, same seed
    seconds: float | None = None
    log: tuple[str, ...] = ()

    @property
    def kind(self) -> str | None:
        return self.measures.kind if self.status == "measured" and self.measures else None

    def to_json(self) -> dict[str, Any]:
        found = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        found["measures"] = None if self.measures is None else measures_to_json(self.measures)
        return found


@dataclasses.dataclass(frozen=True)
class Verdict:
    """`fault` is a leaf of the tree, "none", "does_not_run", or "undecided", then `missing` has the tests to run."""

    fault: str
    summary: str
    evidence: tuple[str, ...] = ()
    advice: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()

    @property
    def decided(self) -> bool:
        return self.fault != "undecided"

    def to_json(self) -> dict[str, Any]:
        return {"decided": self.decided, **dataclasses.asdict(self)}


def verdict(rows: Iterable[Row]) -> Verdict:
    """The fault line that the rows show. Later rows of the same test count."""
    table = {row.test: row for row in rows}
    seen: list[str] = []

    def stand_in(test: str) -> str:
        """The test whose result counts for it: its own, unless it was skipped as the same as another."""
        passed = {test}
        while (row := table.get(test)) is not None and row.status == "skipped" and row.same_as not in (None, *passed):
            test = str(row.same_as)
            passed.add(test)
        return test

    clear = table.get(stand_in("baseline"))
    reference = clear.measures.slope if clear is not None and clear.kind == "picture" and clear.measures else None

    def works(test: str) -> bool | None:
        """True a picture, False noise, None not known; what was asked is evidence."""
        other = stand_in(test)
        row = table.get(other)
        if row is not None:
            _add(seen, _line(row))
        if other != test:
            _add(seen, f"{test}: same as {other} ({table[test].why})")
        if row is not None and row.kind == "unclear" and reference is not None and row.measures is not None:
            # Half as steep as what the same server draws: nearer to noise.
            return False if row.measures.slope > reference / 2 else None
        return {"picture": True, "noise": False, "blank": False}.get(row.kind or "") if row is not None else None

    def settled(test: str) -> bool:
        """Whether running the test (again) would tell nothing new."""
        return stand_in(test) in table

    def end(fault: str, *advice: str, missing: tuple[str, ...] = (), **values: str) -> Verdict:
        return Verdict(fault, _SUMMARIES[fault].format(**values), tuple(seen), advice, missing)

    def undecided(*tests: str) -> Verdict:
        missing = tuple(dict.fromkeys(stand_in(test) for test in tests if not settled(test)))
        if missing:
            why = "the tests " + ", ".join(missing) + " have not been run"
        else:
            status = {test: table[stand_in(test)].status for test in tests}
            unclear, failed, skipped = (
                [test for test in tests if status[test] == kind] for kind in ("measured", "failed", "skipped")
            )
            parts = []
            if unclear:
                parts.append(f"{', '.join(unclear)}: the result is neither clearly a picture nor clearly noise")
            if failed:
                parts.append(f"{', '.join(failed)}: the test itself did not run")
            if skipped:
                parts.append(f"{', '.join(skipped)}: there is nothing to change")
            why = "; ".join(parts)
        advice = () if missing else (_LOOK,)
        return end("undecided", *advice, missing=missing, why=why)

    # ---- is there a fault, and can pictures be made here at all?
    workflow = works("workflow")
    if workflow is True:
        return end("none", *(_others(table, works)))
    row = table.get("workflow")
    runs = row is None or row.status != "failed"
    if runs and workflow is None:
        return undecided("workflow", "baseline")
    baseline = works("baseline")
    if baseline is None:
        failed = table.get("baseline")
        if failed is not None and failed.status == "failed" and works("files") is not True:
            return end("model_stack", *_STACK)
        if works("files") is not True:
            if runs or not settled("baseline"):
                return undecided("baseline")
            return end("does_not_run", "Mend what the error names first.")
    if baseline is False and works("files") is not True:
        if works("files") is None and not settled("files"):
            return undecided("files")
        return end("model_stack", *_STACK)
    if not runs:
        return end("does_not_run", "Mend what the error names first.")
    own = works("files")
    if own is None and not settled("files"):
        return undecided("files")
    if own is False:
        return end(
            "files", "Use the three official files together: diffusion model, Qwen3 0.6B text encoder, Qwen VAE."
        )
    if row is not None and row.measures is not None and row.measures.halves_differ:
        _add(seen, f"the workflow's noise has two halves ({row.measures.halves:.1f} standard deviations apart)")

    # ---- before or after the first sampler?
    first = works("first_pass")
    if first is None:
        return undecided("first_pass")
    if first is True:
        return end("later_pass", "Look at the second pass, the upscaling and the decoding; the first sampler is right.")

    # ---- with regions or without them?
    off = works("regions_off")
    if off is None:
        return undecided("regions_off")
    if off is True:
        return _regional(table, works, settled, end, undecided)

    # ---- the sampling
    singles = {test: works(test) for test in ("sampling", "sampler", "resolution")}
    mending = [test for test, good in singles.items() if good]
    if any(good is None and not settled(test) for test, good in singles.items()):
        return undecided(*singles)
    if mending:
        also = [f"{TESTS[test]} mends it as well" for test in mending[1:]]
        return end(mending[0], _MEND[mending[0]], *also)
    open_singles = [test for test, good in singles.items() if good is None]
    together = works("matched")
    if together is True:
        return end("combination", *(_MEND[test] for test in singles))
    if together is None:
        return undecided("matched")
    plain = works("plain")
    if plain is True:
        removed = _removed(table, "plain")
        return end(
            "patches", "Put them back one at a time; the one after which it fails is the cause.", removed=removed
        )
    if plain is None:
        return undecided("plain")
    if open_singles:
        return undecided(*open_singles)
    return end(
        "undecided",
        "Compare the workflow with the baseline by hand: LoRAs, prompts, where the latent comes from, the VAE's input.",
        why="the baseline works, and no change that these tests know makes the workflow work",
    )


def _regional(table: Mapping[str, Row], works: Any, settled: Any, end: Any, undecided: Any) -> Verdict:
    zero = works("zero_strength")
    shapes = table.get("shapes")
    logged = list(shapes.log[:3]) if shapes is not None else []
    if zero is True:
        return end(
            "regions",
            "Look at the masks on the token grid (anima-fast regions), the token ranges and the strength.",
            *(f"logged: {line}" for line in logged),
            missing=() if settled("shapes") else ("shapes",),
        )
    if zero is None:
        if settled("zero_strength"):
            return end("regional", "Look at both: masks and token ranges, and other nodes that change attention.")
        return undecided("zero_strength")
    off = works("attention_off")
    if off is True:
        return end(
            "attention_conflict",
            "Put the removed nodes back one at a time, or let the regional node come last.",
            removed=_removed(table, "attention_off"),
        )
    row = table.get("attention_off")
    if off is None and row is None:
        return undecided("attention_off")
    if off is None and row is not None and row.status != "skipped":
        return undecided("attention_off")
    return end("override", "Update the regional pack, or use one whose override is made for this ComfyUI version.")


def _others(table: Mapping[str, Row], works: Any) -> list[str]:
    failing = [test for test in ("baseline", "files") if test in table and works(test) is False]
    return [f"{TESTS[test]} gives none, though: look at the files it uses." for test in failing]


def _removed(table: Mapping[str, Row], test: str) -> str:
    row = table.get(test)
    return "; ".join(row.changes) if row is not None and row.changes else "the other patches"


def _line(row: Row) -> str:
    if row.status == "measured" and row.measures is not None:
        m = row.measures
        return f"{row.test}: {m.kind} (flatness {m.flatness:.2f}, slope {m.slope:+.1f}, {m.width} x {m.height})"
    return f"{row.test}: {row.status} ({row.why})"


def _add(lines: list[str], line: str) -> None:
    if line not in lines:
        lines.append(line)


_SUMMARIES = {
    "none": "The workflow gives a picture here: there is nothing to find.",
    "does_not_run": "The workflow does not run on this server.",
    "model_stack": "The baseline fails too: the fault is in the model's files or in the server, not in the workflow.",
    "files": "The workflow's own files fail in the official graph, official ones work: a wrong or damaged file.",
    "later_pass": "The first sampler gives a picture; what comes after it spoils it.",
    "regional": "Without its regions the workflow works: the fault is in the regional part, where is not decided.",
    "regions": "The regional attention runs, but what it is told is wrong: masks on the token grid, or token ranges.",
    "attention_conflict": "The regional override and another patch of attention do not get on ({removed}).",
    "override": "The regional override fails by itself, even without a bias: it does not fit this server.",
    "sampling": "The model is sampled with a wrong shift; with 3.0 on the model it works.",
    "sampler": "The sampler's settings are at fault; with the official ones it works.",
    "resolution": "The resolution is at fault; at one megapixel it works.",
    "combination": "Several settings are at fault together: shift, sampler and resolution have to be right at once.",
    "patches": "A patch on the model spoils the sampling ({removed}).",
    "undecided": "The evidence does not decide: {why}.",
}

_MEND = {
    "sampling": "Remove other sampling patches, or put ModelSamplingAuraFlow with shift 3.0 right after the loader.",
    "sampler": "Use euler or er_sde, scheduler simple, 30 to 50 steps, CFG 4 to 5 (a turbo LoRA: 8 steps, CFG 1).",
    "resolution": "Make the first pass at about one megapixel, in multiples of 16, and enlarge afterwards.",
}

_STACK = (
    "Check the three files (diffusion model, text encoder, VAE): names, sizes, checksums; download them again.",
    "Then the server: update ComfyUI, start it with --disable-all-custom-nodes and with PyTorch's attention.",
    "Weights that were never trained give noise here as well.",
)

_LOOK = "Look at the pictures in the report: an eye decides where these numbers do not."
