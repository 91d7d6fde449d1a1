"""What the checks look at: a workflow, its passes and regions, and the server, files and picture if there are any."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from .files import find
from .guidance import family
from .passes import Pass, is_anima, passes
from .region_masks import Regions, find_regions
from .workflow import Node, Workflow

__all__ = ["Case"]


@dataclass
class Case:
    """One workflow and what surrounds it.

    `environment` is what a server says of itself: its answers to /system_stats and /object_info under these names, and
    `extensions`. `models` is ComfyUI's models folder, `folder` where the workflow is, `picture` the size of the image
    that it made.
    """

    workflow: Workflow
    environment: Mapping[str, Any] | None = None
    models: Path | None = None
    folder: Path | None = None
    picture: tuple[int, int] | None = None

    @cached_property
    def live(self) -> set[str]:
        return self.workflow.live()

    @cached_property
    def nodes(self) -> list[Node]:
        """The nodes that a run reaches."""
        return [node for node in self.workflow.nodes.values() if node.id in self.live]

    @cached_property
    def passes(self) -> list[Pass]:
        return passes(self.workflow, self.live)

    @cached_property
    def regions(self) -> list[Regions]:
        folders = [self.folder] if self.folder else []
        if self.models:
            folders.append(self.models.parent / "input")
        return find_regions(self.workflow, self.live, folders)

    @cached_property
    def files(self) -> dict[str, list[Path]]:
        return find(self.models) if self.models else {}

    @cached_property
    def object_info(self) -> Mapping[str, Any]:
        info = (self.environment or {}).get("object_info") or self.workflow.object_info
        return info if isinstance(info, Mapping) else {}

    @cached_property
    def anima(self) -> bool:
        """Whether this is about Anima: a name says so, or the nodes or the text encoder do."""
        if any(is_anima(self.workflow, one.path) for one in self.passes):
            return True
        if any(node.class_type.startswith(("AnimaFast", "AnimaLLLite")) or regional(node) for node in self.nodes):
            return True
        names = [self.workflow.value(node.id, "clip_name") for node in self.nodes if node.class_type == "CLIPLoader"]
        return any(isinstance(name, str) and family("encoder", name) == "anima" for name in names)

    def label(self, node: str) -> str:
        found = self.workflow.nodes.get(node)
        return str(found) if found else node

    def said(self, node: str, name: str) -> str:
        """How evidence calls an input."""
        return f"{self.label(node)}.{name}"


#: Nodes that make the prompts of a picture regional, by pack.
REGIONAL_PACKS = {
    "AnimaApplyRegionalAttentionHook": "anima-regional-comfy-nodes",
    "AnimaFastRegions": "anima_fast",
    "AnimaRegionalApply": "ComfyUI-Anima-Regional",
    "AnimaRegionalApplyV2": "ComfyUI-Anima-Regional",
    "ApplyAnimaRegionalConditioningPatch": "Comfyui-Anima-Regional-Conditioning",
    "AttentionCouplePPM": "ComfyUI-ppm",
}


def regional(node: Node) -> bool:
    """Whether a node is of a regional pack for Anima."""
    return node.class_type in REGIONAL_PACKS and node.class_type != "AttentionCouplePPM"
