"""What doctor reports: findings with their evidence, and the edits that would mend them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .workflow import Link

__all__ = ["SEVERITIES", "Edit", "Finding", "worst"]

#: From the worst: a picture that cannot come out right, one that probably will not, and what is good to know.
SEVERITIES = ("error", "warning", "note")


@dataclass(frozen=True)
class Edit:
    """One change of a workflow: an input gets a value, or a `Link` to another output.

    With `input` empty the node itself changes: `value` is the class_type it becomes, or None to bypass it.
    """

    node: str
    input: str
    value: Any


@dataclass(frozen=True)
class Finding:
    """One thing found, with what shows it.

    `id` is stable and a heading of docs/doctor.md; `nodes` are ids of the workflow; `evidence` says the values that
    the finding rests on, as "class id.input": value; `edits` is empty where mending needs a person.
    """

    id: str
    severity: str
    summary: str
    why: str
    fix: str
    nodes: tuple[str, ...] = ()
    evidence: Mapping[str, Any] = field(default_factory=dict)
    edits: tuple[Edit, ...] = ()

    @property
    def docs(self) -> str:
        return f"docs/doctor.md#{self.id}"

    def as_json(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "severity": self.severity,
            "summary": self.summary,
            "nodes": list(self.nodes),
            "evidence": {name: _plain(value) for name, value in self.evidence.items()},
            "why": self.why,
            "fix": self.fix,
            "fixable": bool(self.edits),
            "docs": self.docs,
        }


def _plain(value: Any) -> Any:
    if isinstance(value, Link):
        return [value.node, value.slot]
    return value if isinstance(value, (str, int, float, bool, list, type(None))) else str(value)


def worst(findings: Sequence[Finding]) -> str | None:
    """The severity of the worst finding; None if there is none."""
    return next((level for level in SEVERITIES if any(finding.severity == level for finding in findings)), None)
