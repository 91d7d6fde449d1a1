"""The checks: each looks at a `Case` and yields findings. Their ids are the headings of docs/doctor.md."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ..case import Case
from ..findings import SEVERITIES, Finding
from . import environment as _environment
from . import graph as _graph
from . import loading as _loading
from . import model as _model
from . import regions as _regions
from . import settings as _settings

__all__ = ["CHECKS", "run"]

#: In the order of a workflow: its graph, what it loads, the model's way to the sampler, settings, regions, the server.
CHECKS: tuple[Callable[[Case], Iterator[Finding]], ...] = (
    *_graph.CHECKS,
    *_loading.CHECKS,
    *_model.CHECKS,
    *_settings.CHECKS,
    *_regions.CHECKS,
    *_environment.CHECKS,
)


def run(case: Case) -> list[Finding]:
    """All findings, the worst first. A graph that goes in a circle is not looked into further."""
    circle = list(_graph.cycle(case))
    if circle:
        return circle
    # Two passes of one model share its faults: each is said once.
    found: dict[object, Finding] = {}
    for check in CHECKS:
        for finding in check(case):
            found.setdefault((finding.id, finding.nodes[:1], finding.summary), finding)
    return sorted(found.values(), key=lambda finding: SEVERITIES.index(finding.severity))
