"""The model's way to each sampler: its noise schedule, what the regional nodes see, who overrides attention."""

from __future__ import annotations

from collections.abc import Iterator

from ..case import REGIONAL_PACKS, Case
from ..findings import Edit, Finding
from ..guidance import SHIFT, SHIFT_TOLERANCE
from ..passes import FlowSampling, Pass, model_path, sampling
from ..workflow import Link, Node

__all__ = ["CHECKS"]

#: Nodes that put one function in the single place of the model's attention override, whatever was there.
OVERRIDES = frozenset({"ModelAttentionBackend", "ModelAttentionSelector", "PathchSageAttentionKJ"})


def timestep_scale(case: Case) -> Iterator[Finding]:
    for one in case.passes if case.anima else []:
        found = sampling(case.workflow, one.path)
        if found.kind == "other" and found.node:
            node = case.workflow.nodes[found.node]
            yield Finding(
                "sampling-type",
                "error",
                f"{node} gives Anima the sampling of another kind of model",
                "Anima is a flow model: x = (1 - t)·picture + t·noise. Another parameterization reads its output as "
                "something else, and sampling ends in noise.",
                f"Remove {node}: ComfyUI's own setting for Anima is right.",
                (found.node, one.node.id),
                {case.label(found.node): {k: v for k, v in node.inputs.items() if not isinstance(v, Link)}},
                (Edit(found.node, "", None),),
            )
        elif found.multiplier != 1 and found.node:
            yield Finding(
                "timestep-scale",
                "error",
                f"{case.label(found.node)} tells Anima timesteps from 0 to 1000; it expects 0 to 1",
                "ModelSamplingSD3 and ModelSamplingAuraFlow differ in this factor alone. With the wrong one each step "
                "is denoised for another amount of noise than there is, and the picture stays noise.",
                "Use ModelSamplingAuraFlow with shift 3, or no such node at all: ComfyUI's Anima has shift 3 built in.",
                (found.node, one.node.id),
                {
                    case.said(found.node, "shift"): found.shift,
                    "timestep multiplier": f"{found.multiplier:g}, Anima's is 1",
                },
                (Edit(found.node, "", "ModelSamplingAuraFlow"),),
            )


def shift(case: Case) -> Iterator[Finding]:
    for one in case.passes if case.anima else []:
        found = sampling(case.workflow, one.path)
        if found.kind != "flow" or found.node is None or not isinstance(found.shift, (int, float)):
            continue
        node = case.workflow.nodes[found.node]
        if abs(found.shift - SHIFT) <= SHIFT_TOLERANCE:
            continue
        plain = node.class_type in ("ModelSamplingAuraFlow", "ModelSamplingSD3")
        where = (found.node, "shift") if plain else (found.node, "max_shift")
        if not plain and abs(found.shift - SHIFT) <= 0.25:  # Flux's own default at 1 MP is 3.16
            continue
        yield Finding(
            "sampling-shift",
            "warning",
            f"the noise schedule has shift {found.shift:g}, Anima's is {SHIFT:g}",
            "The shift says how long sampling stays at high noise. Lower, the composition gets too few steps; higher, "
            "the details do. Current ComfyUI has 3 built in; the node is only needed for another value.",
            f"Set shift to {SHIFT:g}, or remove {node}.",
            (found.node, one.node.id),
            {case.said(*where): found.shift if plain else f"e^mu = {found.shift:g}"},
            (Edit(found.node, "shift", SHIFT) if plain else Edit(found.node, "", None),),
        )


def patched_twice(case: Case) -> Iterator[Finding]:
    for one in case.passes if case.anima else []:
        nodes = [node for node in one.path if node.class_type.startswith("ModelSampling")]
        if len(nodes) > 1:
            yield Finding(
                "sampling-patched-twice",
                "note",
                f"{len(nodes)} nodes set the noise schedule of {one.node}; {nodes[0]} is the one that counts",
                "Each replaces what the one before it set.",
                "Keep one.",
                tuple(node.id for node in nodes),
                {case.label(node.id): case.workflow.value(node.id, "shift") for node in nodes},
            )


def built_in_shift(case: Case) -> Iterator[Finding]:
    """Said only to those who use the pack whose documents ask for the node."""
    for regions in case.regions:
        for one in case.passes if regions.pack == "hook" else []:
            if one.path and sampling(case.workflow, one.path).node is None and _reads(case, one, regions.node.id):
                yield Finding(
                    "sampling-shift-built-in",
                    "note",
                    "no ModelSamplingAuraFlow node, and none is needed",
                    "ComfyUI builds shift 3 and the flow parameterization into Anima, since 0.11, the first with "
                    "Anima; "
                    "the official templates have no such node. A model patched with shift 3 samples exactly the same.",
                    "Nothing. If the picture is noise, the cause is elsewhere.",
                    (one.node.id, *(node.id for node in one.path)),
                    {"model path": " <- ".join(str(node) for node in [one.node, *one.path])},
                )


def _reads(case: Case, one: Pass, node: str) -> bool:
    """Whether a pass depends on a node."""
    return node in case.workflow.ancestors(one.node.id)


def scheduler_model(case: Case) -> Iterator[Finding]:
    for one in case.passes if case.anima else []:
        if one.scheduler_path is None or not one.path:
            continue
        mine, theirs = sampling(case.workflow, one.path), sampling(case.workflow, one.scheduler_path)
        if _schedule(mine) != _schedule(theirs):
            yield Finding(
                "scheduler-model",
                "warning",
                f"{one.node} samples with one schedule (shift {mine.shift}), its sigmas come from another "
                f"(shift {theirs.shift})",
                "The scheduler asks the model it is connected to for its sigmas; the sampler's model has others.",
                "Connect the same patched model to the scheduler and to the guider or sampler.",
                (one.node.id, *(n for n in (mine.node, theirs.node) if n)),
                {
                    "sampler's model": " <- ".join(str(node) for node in one.path),
                    "scheduler's model": " <- ".join(str(node) for node in one.scheduler_path),
                },
            )


def _schedule(found: FlowSampling) -> tuple[str, object, float]:
    return (
        found.kind,
        found.shift if not isinstance(found.shift, (int, float)) else float(found.shift),
        found.multiplier,
    )


def regional_model(case: Case) -> Iterator[Finding]:
    """Do the regional nodes of the hook pack see the model that the sampler uses, and does it matter."""
    for regions in case.regions:
        if regions.pack != "hook":
            continue
        for one in case.passes:
            if not one.path or not _reads(case, one, regions.node.id):
                continue
            for node in (regions.grid, regions.node):
                if node is None or not isinstance(node.inputs.get("model"), Link):
                    continue
                path = model_path(case.workflow, node.id)
                if not path or [n.id for n in path] == [n.id for n in one.path]:
                    continue
                yield _differs(case, one, node, path)


def _differs(case: Case, one: Pass, node: Node, path: list[Node]) -> Finding:
    mine, theirs = sampling(case.workflow, one.path), sampling(case.workflow, path)
    gates = "start_percent" in node.inputs
    evidence = {
        f"sampler's model ({one.node})": " <- ".join(str(n) for n in one.path),
        f"regional model ({node})": " <- ".join(str(n) for n in path),
    }
    wanted = one.node.inputs.get("model")
    edits = (
        (Edit(node.id, "model", wanted),) if isinstance(wanted, Link) and node.id not in _before(case, wanted) else ()
    )
    fix = f"Connect what {one.node} gets as model to {node} too."
    if path[-1].id != one.path[-1].id and _file(path[-1]) != _file(one.path[-1]):
        return Finding(
            "regional-model",
            "error",
            f"{node} sees another checkpoint than {one.node}",
            "Its token grid and its time window are those of a model that does not sample.",
            fix,
            (node.id, one.node.id, path[-1].id, one.path[-1].id),
            evidence,
            edits,
        )
    if gates and _schedule(mine) != _schedule(theirs):
        return Finding(
            "regional-model",
            "warning",
            f"{node} counts its time window by another schedule (shift {theirs.shift}) than {one.node} samples by "
            f"(shift {mine.shift})",
            "start_percent and end_percent become sigmas by the model that the node sees; on the sampler's schedule "
            "these are other steps.",
            fix,
            (node.id, path[0].id, one.node.id),
            evidence,
            edits,
        )
    return Finding(
        "regional-model",
        "note",
        f"{node} sees a model with other patches than {one.node}; it makes no difference here",
        "The node reads the patch size, which no patch changes"
        + (", and the schedule, which is the same." if gates else "."),
        f"Nothing. To be tidy: {fix[0].lower()}{fix[1:]}",
        (node.id, one.node.id),
        evidence,
        edits,
    )


def _before(case: Case, link: Link) -> set[str]:
    return case.workflow.ancestors(link.node)


def _file(node: Node) -> object:
    return next((value for name, value in node.inputs.items() if name in ("unet_name", "ckpt_name")), node.id)


def override_conflict(case: Case) -> Iterator[Finding]:
    for one in case.passes:
        before = case.workflow.ancestors(one.positive.node) if one.positive else set()
        hooks = sorted(n for n in before if case.workflow.nodes[n].class_type == "AnimaApplyRegionalAttentionHook")
        replaced = [node for node in one.path if node.class_type in OVERRIDES]
        if hooks and replaced:
            yield Finding(
                "override-conflict",
                "error",
                f"{replaced[0]} takes the attention override that {case.label(hooks[0])} sets: regions never act",
                "There is one optimized_attention_override. An override of the model wins over one that comes with the "
                "conditioning, and this one does not pass calls on.",
                f"Remove {replaced[0]}, or use Anima Regions of anima_fast, which takes cross-attention only and hands "
                "all else on.",
                (replaced[0].id, *hooks, one.node.id),
                {"writers": [str(replaced[0]), *(case.label(hook) for hook in hooks)]},
                tuple(Edit(node.id, "", None) for node in replaced),
            )
        if len(hooks) > 1:
            yield Finding(
                "override-conflict",
                "warning",
                f"{len(hooks)} hooks write the attention override of {one.node}: only one acts",
                "Their settings have the same names in transformer_options, so the last one merged replaces the "
                "others.",
                "Put all regions in one AnimaRegionalConditioningConcat and keep one hook.",
                (*hooks, one.node.id),
                {"writers": [case.label(hook) for hook in hooks]},
            )
        if len(replaced) > 1:
            yield Finding(
                "override-conflict",
                "warning",
                f"{len(replaced)} nodes write the model's attention override: only {replaced[0]} acts",
                "Each replaces the one before it.",
                f"Keep {replaced[0]}.",
                tuple(node.id for node in replaced),
                {"writers": [str(node) for node in replaced]},
                tuple(Edit(node.id, "", None) for node in replaced[1:]),
            )
        packs = {REGIONAL_PACKS[n.class_type]: n.id for n in one.path if n.class_type in REGIONAL_PACKS}
        packs.update({"anima-regional-comfy-nodes": hooks[0]} if hooks else {})
        if len(packs) > 1:
            yield Finding(
                "override-conflict",
                "warning",
                f"{' and '.join(sorted(packs))} both make {one.node} regional",
                "Each takes Anima's cross-attention for itself; what comes out is neither's regions.",
                "Keep one.",
                (*packs.values(), one.node.id),
                {"packs": sorted(packs)},
            )


def regions_unused(case: Case) -> Iterator[Finding]:
    """A regional node whose result no sampler takes: it runs, or does not, without effect."""
    sampled = {node.id for one in case.passes for node in one.path}
    for one in case.passes:
        for link in (one.positive, one.negative):
            sampled |= case.workflow.ancestors(link.node) if link else set()
    for node in case.workflow.nodes.values():
        name = {"AnimaFastRegions": "model", "AnimaApplyRegionalAttentionHook": "positive"}.get(node.class_type)
        if name is None or not case.passes:
            continue
        on_path = any(node.id in {n.id for n in one.path} for one in case.passes)
        used = on_path if node.class_type == "AnimaFastRegions" else node.id in sampled
        if not used:
            yield Finding(
                "regions-unused",
                "warning" if node.id in case.live else "note",  # put aside on purpose, it may be
                f"{node} has no effect: its {name} reaches no sampler",
                "The picture is the same as without regions.",
                f"Connect the {name} output of {node} to the sampler.",
                (node.id, *(one.node.id for one in case.passes)),
                {case.label(one.node.id): " <- ".join(str(n) for n in one.path) for one in case.passes},
            )
    for one in case.passes:
        if not (one.positive and one.negative):
            continue
        hooked = [
            any(
                case.workflow.nodes[n].class_type == "AnimaApplyRegionalAttentionHook"
                for n in case.workflow.ancestors(l.node)
            )
            for l in (one.positive, one.negative)
        ]
        if hooked == [True, False]:
            yield Finding(
                "regions-half-connected",
                "note",
                f"{one.node} takes the hook's positive but not its negative",
                "ComfyUI batches the two only if their hooks are the same; else each step runs the model twice.",
                "Connect the hook's second output to the sampler's negative.",
                (one.node.id,),
                {"positive": case.label(one.positive.node), "negative": case.label(one.negative.node)},
            )


CHECKS = (
    timestep_scale,
    shift,
    patched_twice,
    built_in_shift,
    scheduler_model,
    regional_model,
    override_conflict,
    regions_unused,
)
