"""Jobs of `anima-fast batch`: one JSON object a line, checked, named and grouped into batches.

A line holds the fields of a `Request`, and of them only `prompt` is required; `id` names the picture's file, `seeds`
makes one picture of each. Files are named relative to the job file.

    {"prompt": "a village street", "size": "832x1216", "seeds": [1, 2],
     "regions": [{"mask": "left.png", "prompt": "a red house"}]}

Batches follow from the job file alone, not from what is still to be painted: after a resume a job stands in the same
batch as before, so that its picture is the same bit for bit.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..commands.regions import parse_size
from ..errors import invalid, wrong_type
from ..integrations.diffusers import OUTSIDE
from .encoder import EncoderChoice
from .request import DTYPES, Embedded, Request, RequestRegion

__all__ = ["BadJob", "Batch", "Job", "digest", "group", "model_key", "one_line", "read_jobs"]

_NUMBER = (int, float)
_TYPES: dict[str, tuple[type, ...]] = {
    "prompt": (str,), "negative": (str,), "seed": (int,), "steps": (int,), "guidance": _NUMBER, "strength": _NUMBER,
    "shift": (*_NUMBER, type(None)), "start": _NUMBER, "end": _NUMBER, "outside": (str,), "base": (bool,),
    "plan": (dict,), "dtype": (str,), "model": (str,), "id": (str,), "seeds": (list,), "size": (str, list),
    "regions": (list,), "image": (str, type(None)), "encoder": (dict, type(None)), "hires": (*_NUMBER, type(None)),
    "hires_denoise": _NUMBER, "tiled": (bool,), "tile": (int,), "overlap": (int, type(None)),
    "attention_chunk": (int, type(None)),
}  # fmt: skip
_CHOICES = {"outside": OUTSIDE, "dtype": tuple(DTYPES)}
_REGION_TYPES: dict[str, tuple[type, ...]] = {
    "mask": (str,), "prompt": (str,), "strength": _NUMBER, "priority": _NUMBER,
}  # fmt: skip
_ENCODER_TYPES: dict[str, tuple[type, ...]] = {
    "file": (str,), "recurrence": (str,), "head_norm": (str,), "tokenizer": (str, type(None)),
    "alignment": (str, type(None)), "alignment_strength": _NUMBER, "calibration": (str, type(None)),
    "output_scale": _NUMBER, "force": (bool,),
}  # fmt: skip
_NAMES = {"dict": "an object", "list": "a list", "str": "a string", "int": "a whole number", "float": "a number",
          "bool": "true or false", "NoneType": "null"}  # fmt: skip

#: What the rows of one batch may differ in.
_OF_ROW = ("prompt", "negative", "regions", "seed")

_DEFAULTS = {**Request("").to_json(), "prompt": None, "dtype": None, "anima_fast": None}

_OPTION = re.compile(r"(?<![^\s(,])--(?=[a-z])")

_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")


@dataclasses.dataclass(frozen=True)
class Job:
    """One picture to paint. `digest` stands for the request: the same one, the same picture."""

    id: str
    line: int
    request: Request
    digest: str

    @property
    def file(self) -> str:
        return f"{self.id}.png"


@dataclasses.dataclass(frozen=True)
class BadJob:
    """A line, or one of its pictures, that cannot be painted, and why."""

    line: int
    reason: str
    id: str | None = None


@dataclasses.dataclass(frozen=True)
class Batch:
    """Jobs that are painted in one launch, in this order; `wanted` of them are still to be written."""

    number: int
    jobs: tuple[Job, ...]
    wanted: frozenset[str] = frozenset()

    @property
    def model(self) -> str:
        return model_key(self.jobs[0].request)


def read_jobs(path: str | Path, defaults: Mapping[str, Any] | None = None) -> tuple[list[Job], list[BadJob]]:
    """The jobs of a file in its order, and the lines that are none; `defaults` are fields that lines may leave out.

    Raises FileNotFoundError; ValueError when the file is no text.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"JOBS: no file {str(path)!r}")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise invalid("JOBS", f"{str(path)!r}, which is not UTF-8 text", "one JSON object a line") from error
    reader = _Reader(path.parent, dict(defaults or {}))
    jobs: list[Job] = []
    bad: list[BadJob] = []
    seen: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            found = reader.read(line, number)
        except (ValueError, TypeError, OSError) as error:
            bad.append(BadJob(number, one_line(error)))
            continue
        for job in found:
            name = job.id.casefold()  # some file systems know no other
            if name in seen:
                reason = f"id: {job.id!r} is that of line {seen[name]} too; allowed: one for each picture"
                bad.append(BadJob(number, reason, job.id))
            else:
                seen[name] = number
                jobs.append(job)
    return jobs, bad


def digest(request: Request) -> str:
    """Sixteen hexadecimal digits that stand for a request, whatever version wrote its record.

    A field at its default does not count: a later version may have more of them.
    """
    record = {name: value for name, value in request.to_json().items() if value != _DEFAULTS.get(name)}
    del record["anima_fast"]
    if request.encoder is not None:
        record["encoder"] = {name: value for name, value in record["encoder"].items() if name != "sums"}
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:16]


def one_line(error: Exception) -> str:
    """What an error says of a job: the command's options are its fields."""
    return _OPTION.sub("", " ".join(str(error).split()))


def model_key(request: Request) -> str:
    """What a worker has to load for a request."""
    encoder = None if request.encoder is None else dataclasses.asdict(request.encoder)
    return json.dumps([request.model, request.dtype, encoder])


def group(jobs: Sequence[Job], batch_size: int) -> list[Batch]:
    """Batches of at most `batch_size` jobs that differ in prompts, regions and seed only; one model's together."""
    groups: dict[str, dict[str, list[Job]]] = {}
    for job in jobs:
        fields = {name: value for name, value in vars(job.request).items() if name not in _OF_ROW}
        if job.request.image is not None:
            fields["image"] = hashlib.sha256(job.request.image.data).hexdigest()
        groups.setdefault(model_key(job.request), {}).setdefault(repr(fields), []).append(job)
    rows = [
        tuple(alike[start : start + size])
        for of_model in groups.values()
        for alike in of_model.values()
        for size in (1 if alike[0].request.large else batch_size,)  # a large picture is work enough for a launch
        for start in range(0, len(alike), size)
    ]
    return [Batch(number, jobs) for number, jobs in enumerate(rows)]


class _Reader:
    """Lines to jobs; a mask that many jobs name is read and checked once."""

    def __init__(self, directory: Path, defaults: dict[str, Any]) -> None:
        self.directory = directory
        self.defaults = defaults
        self.files: dict[str, Embedded] = {}
        self.checked: set[str] = set()

    def read(self, line: str, number: int) -> list[Job]:
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"no JSON: {error.msg} at column {error.colno}") from error
        if not isinstance(record, dict):
            raise wrong_type("the line", record, 'a JSON object, such as {"prompt": "a cat"}')
        _check_types(record, _TYPES, "")
        if "prompt" not in record:
            raise invalid("prompt", "nothing", "a text")
        fields: dict[str, Any] = {**self.defaults, **record}
        name, seeds = fields.pop("id", None), fields.pop("seeds", None)
        if name is not None and not _ID.fullmatch(name):
            raise invalid("id", repr(name), "up to 100 letters, digits and . _ -, not beginning with . or -")
        for field, allowed in _CHOICES.items():
            if field in fields and fields[field] not in allowed:
                raise invalid(field, repr(fields[field]), " | ".join(allowed))
        fields["regions"] = tuple(self._region(i, region) for i, region in enumerate(fields.get("regions", ())))
        if fields.get("image") is not None:
            fields["image"] = self._file(fields["image"], "image")
            fields.setdefault("size", fields["image"].size("image"))
        fields["size"] = _size(fields.get("size", Request.size))
        if fields.get("encoder") is not None:
            fields["encoder"] = _encoder(fields["encoder"])
        if seeds is None:
            request = Request(**fields)
            self._check(request)
            found = digest(request)
            return [Job(name or found, number, request, found)]
        if "seed" in record:
            raise invalid("seed, seeds", "both", "one of them")
        if not seeds or not all(isinstance(seed, int) and not isinstance(seed, bool) for seed in seeds):
            raise invalid("seeds", json.dumps(seeds), "a list of whole numbers")
        jobs = []
        for seed in seeds:
            request = Request(**{**fields, "seed": seed})
            self._check(request)
            found = digest(request)
            jobs.append(Job(f"{name}-{seed}" if name else found, number, request, found))
        return jobs

    def _region(self, i: int, region: Any) -> RequestRegion:
        if not isinstance(region, dict):
            raise wrong_type(f"regions[{i}]", region, "an object with mask and prompt")
        _check_types(region, _REGION_TYPES, f"regions[{i}].")
        for name in ("mask", "prompt"):
            if name not in region:
                raise invalid(f"regions[{i}].{name}", "nothing", "a value; it is required")
        return RequestRegion(**{**region, "mask": self._file(region["mask"], f"regions[{i}].mask")})

    def _file(self, name: str, field: str) -> Embedded:
        path = str(self.directory / name)
        if path not in self.files:
            self.files[path] = Embedded.read(path, field)
        return self.files[path]

    def _check(self, request: Request) -> None:
        """`Request.check`, which decodes every mask, once for each set of regions."""
        regions = [(id(region.mask), region.strength, region.priority) for region in request.regions]
        key = repr((regions, request.plan))
        request.check() if key not in self.checked else dataclasses.replace(request, regions=()).check()
        self.checked.add(key)


def _check_types(record: Mapping[str, Any], types: Mapping[str, tuple[type, ...]], prefix: str) -> None:
    for name, value in record.items():
        if name not in types:
            raise ValueError(f"{prefix}{name}: an unknown field; allowed: {', '.join(types)}")
        allowed = types[name]
        if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
            # an integer is a number too: the last type says it all
            kinds = [kind for kind in allowed if not (kind is int and float in allowed)]
            names = " or ".join(dict.fromkeys(_NAMES[kind.__name__] for kind in kinds))
            raise invalid(f"{prefix}{name}", json.dumps(value), names)


def _encoder(record: dict[str, Any]) -> EncoderChoice:
    _check_types(record, _ENCODER_TYPES, "encoder.")
    if "file" not in record:
        raise invalid("encoder.file", "nothing", "a value; it is required")
    for name in ("file", "tokenizer", "alignment", "calibration"):
        path = record.get(name)
        if path is not None and not Path(path).exists():
            raise FileNotFoundError(f"encoder.{name}: no file {path!r}")
    return EncoderChoice(**record)


def _size(size: Any) -> tuple[int, int]:
    if isinstance(size, str):
        try:
            return parse_size(size)
        except ValueError as error:
            raise ValueError(f"size: {error}") from error
    if len(size) != 2 or not all(isinstance(n, int) and not isinstance(n, bool) and 16 <= n <= 65536 for n in size):
        raise invalid("size", json.dumps(size), '"832x1216" or [832, 1216], each from 16 to 65536')
    return size[0], size[1]
