"""Sets of prompts: a text file with one a line, or a table (.csv, .tsv) with the columns `prompt` and `category`."""

from __future__ import annotations

import csv
import dataclasses
import io
import os
from pathlib import Path

from ..errors import invalid

__all__ = ["Prompts", "read_prompts"]


@dataclasses.dataclass(frozen=True)
class Prompts:
    texts: tuple[str, ...]
    categories: tuple[str, ...] | None = None
    repeated: int = 0  # how many lines were left out because they were there before


def read_prompts(path: str | os.PathLike[str]) -> Prompts:
    """The prompts of a file in UTF-8, each once. The category column may be missing; other columns are ignored.

    Raises FileNotFoundError; ValueError for other bytes, a table without the column `prompt`, or no prompt at all.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"prompts: no file {str(path)!r}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise invalid("prompts", f"{str(path)!r}, bytes that are not UTF-8", "text") from error
    kind = path.suffix.lower()
    if kind in (".csv", ".tsv"):
        rows = csv.DictReader(io.StringIO(text), delimiter="," if kind == ".csv" else "\t")
        columns = rows.fieldnames or []
        if "prompt" not in columns:
            found = ", ".join(map(repr, columns)) or "nothing"
            raise invalid("prompts", f"{str(path)!r} with the columns {found}", "a column prompt, and maybe category")
        try:
            pairs = [(row["prompt"] or "", row.get("category") or "") for row in rows]
        except csv.Error as error:
            raise invalid("prompts", f"{str(path)!r}, line {rows.line_num}: {error}", "a whole table") from error
    else:
        pairs = [(line, "") for line in text.splitlines()]
    pairs = [(prompt.strip(), category.strip()) for prompt, category in pairs if prompt.strip()]
    if not pairs:
        raise invalid("prompts", f"{str(path)!r} without a prompt", "at least one")
    once: dict[str, str] = {}
    for prompt, category in pairs:
        once.setdefault(prompt, category)
    categories = tuple(once.values())
    return Prompts(tuple(once), categories if any(categories) else None, len(pairs) - len(once))
