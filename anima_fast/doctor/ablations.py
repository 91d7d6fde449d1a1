"""The tests of the decision tree as transformations of a prompt in ComfyUI's API form.

`plan(prompt, object_info)` gives one `Ablation` for each test of `verdict.TESTS`: a prompt to queue, what was changed
in it, or why there is nothing to change. Each one changes one thing, keeps the seed, and ends in one PreviewImage, so
that the server's output folder stays as it was (where there is no VAE, a SaveLatent, which writes there).

What a node is, is asked of the server's /object_info: inputs and outputs by type. Only what types cannot tell is listed
here: which nodes are regional, samplers, sampling patches.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from ..errors import invalid
from .guidance import TURBO_NAMES
from .server import Prompt
from .verdict import TESTS

__all__ = ["END", "Ablation", "Official", "plan"]

#: The id of the node whose output is measured.
END = "anima_fast_doctor"


@dataclasses.dataclass(frozen=True)
class Official:
    """The official workflow: what Comfy-Org's template image_anima_base_v1 has, in numbers and names."""

    model: str = "anima-base-v1.0.safetensors"
    clip: str = "qwen_3_06b_base.safetensors"
    vae: str = "qwen_image_vae.safetensors"
    sampler: str = "euler"
    scheduler: str = "simple"
    steps: int = 30
    cfg: float = 4.0
    turbo_steps: int = 8
    turbo_cfg: float = 1.0
    shift: float = 3.0
    size: tuple[int, int] = (1024, 1024)
    #: Something with large shapes and plain colours, which any checkpoint of the family draws.
    text: str = "a red apple on a wooden table, a blue wall behind it, daylight, simple background"
    negative: str = "worst quality, low quality, blurry"


@dataclasses.dataclass(frozen=True)
class Ablation:
    """A test: `prompt` to queue, or None and `why` there is none; `same_as` is the test whose result stands for it."""

    test: str
    prompt: Prompt | None
    changes: tuple[str, ...] = ()
    why: str | None = None
    same_as: str | None = None


#: What a regional node's outputs are when it is left out: output -> input. Others are told by name and types.
_REGIONAL = {
    "AnimaApplyRegionalAttentionHook": ("positive", "negative"),
    "AnimaFastRegions": ("model", "base", "negative"),
}
_REGIONAL_NAME = re.compile(r"region|attention.?couple|attn.?couple", re.IGNORECASE)
#: Parts of regional set-ups that only prepare what another node applies.
_PREPARING = frozenset(
    {"AnimaFastRegion", "AnimaFastRegionPreview", "AnimaRegionalConditioningConcat", "AnimaMaskToTokenGrid"}
)
#: Regional nodes that put their override on the conditioning: one on the model takes its place.
_ON_CONDITIONING = frozenset({"AnimaApplyRegionalAttentionHook"})
_STRENGTH = frozenset({"AnimaBuildRegionalCrossAttnBias", "AnimaFastRegions"})
_SAMPLERS = frozenset({"KSampler", "KSamplerAdvanced", "SamplerCustom", "SamplerCustomAdvanced"})
_SAMPLING = re.compile(r"^ModelSampling")
_LORA = re.compile(r"lora", re.IGNORECASE)
_DEBUG = ("debug_shapes", "debug")

#: Enough for the window of steps of every regional node, and little work.
_SHAPE_STEPS = 6


def plan(prompt: Prompt, object_info: Mapping[str, Any], official: Official | None = None) -> list[Ablation]:
    """Every test of a workflow, in the order of `verdict.TESTS`.

    Args:
        prompt: the workflow in API form; it is not changed.
        object_info: the server's.
        official: what counts as official: size and steps can be made smaller for a slow machine, at the price that the
            baseline is no longer the recommended one.

    Raises ValueError if there is no sampler, or nothing that comes out of it.
    """
    return _Planner(prompt, object_info, official or Official()).ablations()


class _Graph:
    """A copy of a prompt to change, with a note of each change."""

    def __init__(self, prompt: Prompt, info: Mapping[str, Any]) -> None:
        self.nodes = copy.deepcopy(prompt)
        self.info = info
        self.changes: list[str] = []

    def kind(self, node: str) -> str:
        return str(self.nodes[node].get("class_type"))

    def inputs(self, node: str) -> dict[str, Any]:
        found = self.nodes[node].setdefault("inputs", {})
        return found if isinstance(found, dict) else {}

    def links(self, node: str) -> Iterator[tuple[str, str, int]]:
        """Each connected input: its name, the node it comes from, that node's output."""
        for name, value in self.inputs(node).items():
            if self.is_link(value):
                yield name, str(value[0]), value[1]

    def is_link(self, value: Any) -> bool:
        return (
            isinstance(value, list)
            and len(value) == 2
            and isinstance(value[1], int)
            and not isinstance(value[1], bool)
            and str(value[0]) in self.nodes
        )

    def output_types(self, node: str) -> list[str]:
        return [str(t) for t in self.info.get(self.kind(node), {}).get("output", [])]

    def type_of(self, node: str, output: int) -> str:
        types = self.output_types(node)
        return types[output] if 0 <= output < len(types) else "?"

    def consumers(self, node: str, output: int | None = None) -> list[tuple[str, str]]:
        return [
            (other, name)
            for other in self.nodes
            for name, source, index in self.links(other)
            if source == node and output in (None, index)
        ]

    def upstream(self, *starts: str) -> list[str]:
        """The nodes that lead to `starts`, these first; each once, so cycles end."""
        seen, waiting = dict.fromkeys(starts), list(starts)
        while waiting:
            for _, source, _ in self.links(waiting.pop(0)):
                if source not in seen:
                    seen[source] = None
                    waiting.append(source)
        return list(seen)

    def source(self, link: Any) -> tuple[str, int]:
        """Where a link comes from, past nodes that only pass on (switches)."""
        seen = set()
        node, output = str(link[0]), int(link[1])
        while node not in seen and self.kind(node) in ("Reroute", "ComfySwitchNode"):
            seen.add(node)
            inputs = self.inputs(node)
            if self.kind(node) == "Reroute":
                following = next((value for value in inputs.values() if self.is_link(value)), None)
            else:
                chosen = self.value(inputs.get("switch"))
                following = inputs.get("on_true" if chosen else "on_false")
            if not self.is_link(following):
                break
            assert following is not None
            node, output = str(following[0]), int(following[1])
        return node, output

    def value(self, value: Any) -> Any:
        """A widget's value, through primitives; None if it is computed."""
        for _ in range(len(self.nodes) + 1):
            if not self.is_link(value):
                return value
            node, _output = self.source(value)
            if not self.kind(node).startswith("Primitive"):
                return None
            value = self.inputs(node).get("value")
        return None

    def set(self, node: str, **values: Any) -> None:
        for name, value in values.items():
            before = self.inputs(node).get(name)
            if before != value:
                shown = self.value(before)
                arrow = f"{name} {'linked' if shown is None and before is not None else shown} -> {value}"
                self.changes.append(f"node {node} ({self.kind(node)}): {arrow}")
                self.inputs(node)[name] = value

    def add(self, kind: str, **inputs: Any) -> str:
        node = next(f"{END}_{i}" for i in range(len(self.nodes) + 1) if f"{END}_{i}" not in self.nodes)
        self.nodes[node] = {"class_type": kind, "inputs": inputs}
        return node

    def bypass(self, node: str, mapping: Mapping[int, str]) -> bool:
        """Connect what a node's outputs feed to its own inputs instead; False if one of them cannot be."""
        inputs = self.inputs(node)
        used = {output for _, _, output in self._outgoing(node)}
        if any(not self.is_link(inputs.get(mapping.get(output, ""))) for output in used):
            return False
        for other, name, output in self._outgoing(node):
            self.inputs(other)[name] = list(inputs[mapping[output]])
        self.changes.append(f"node {node} ({self.kind(node)}): left out")
        return True

    def _outgoing(self, node: str) -> list[tuple[str, str, int]]:
        return [
            (other, name, index) for other in self.nodes for name, source, index in self.links(other) if source == node
        ]

    def by_type(self, node: str) -> dict[int, str]:
        """As ComfyUI bypasses: each output is the first unused input of its type."""
        left = [(name, self.type_of(source, index)) for name, source, index in self.links(node)]
        mapping = {}
        for output, kind in enumerate(self.output_types(node)):
            for entry in left:
                if entry[1] == kind:
                    mapping[output] = entry[0]
                    left.remove(entry)
                    break
        return mapping

    def finish(self, picture: Any, latent: Any) -> Prompt:
        """The nodes that lead to the picture, or without one to the latent, and nothing else."""
        if picture is not None:
            self.nodes[END] = {"class_type": "PreviewImage", "inputs": {"images": list(picture)}}
        else:
            inputs = {"samples": list(latent), "filename_prefix": f"{END}/latent"}
            self.nodes[END] = {"class_type": "SaveLatent", "inputs": inputs}
        return {node: self.nodes[node] for node in self.upstream(END)}


_Step = Callable[[_Graph], "str | None"]


class _Planner:
    def __init__(self, prompt: Prompt, info: Mapping[str, Any], official: Official) -> None:
        self.info, self.official = info, official
        self.prompt = {
            str(node): value for node, value in prompt.items() if isinstance(value, dict) and "class_type" in value
        }
        graph = self.graph()
        self.sampler = self._first_sampler(graph)
        self.final = self._final_picture(graph)
        self.chain = self._model_chain(graph)
        if not self.chain:
            raise invalid("workflow", f"a sampler (node {self.sampler}) without a model", "one that is connected")
        self.root = self.chain[-1]
        self.regional = [n for n in graph.upstream(self.sampler) if self._is_regional(graph, n)]
        self.turbo = any(
            _LORA.search(graph.kind(n)) and TURBO_NAMES.search(str(graph.value(graph.inputs(n).get("lora_name"))))
            for n, _ in self.chain
        )

    def graph(self) -> _Graph:
        return _Graph(self.prompt, self.info)

    def ablations(self) -> list[Ablation]:
        baseline, own = self._baselines()
        off, all_three = self._regions_off, (self._shift, self._settings, self._resolution)
        made = {
            "baseline": baseline,
            "files": own,
            "workflow": self._workflow(),
            "first_pass": self._first_pass(),
            "regions_off": self._changed("regions_off", "first_pass", off),
            "zero_strength": self._changed("zero_strength", None, self._zero_strength),
            "sampling": self._changed("sampling", "regions_off", self._shift, base=[off]),
            "sampler": self._changed("sampler", "regions_off", self._settings, base=[off]),
            "resolution": self._changed("resolution", "regions_off", self._resolution, base=[off]),
            "matched": self._changed("matched", "regions_off", *all_three, base=[off]),
            "shapes": self._changed("shapes", None, self._shapes),
            "attention_off": self._changed("attention_off", "first_pass", self._attention_off),
            "plain": self._changed("plain", "matched", self._attention_off, base=[off, *all_three]),
        }
        found: list[Ablation] = []
        for one in (made[test] for test in TESTS):
            twin = next((o.test for o in found if one.prompt is not None and o.prompt == one.prompt), None)
            why = f"it would be the same prompt as {twin}"
            found.append(one if twin is None else Ablation(one.test, None, one.changes, why, twin))
        return found

    # ---- reading

    def _first_sampler(self, graph: _Graph) -> str:
        samplers = [n for n in graph.nodes if graph.kind(n) in _SAMPLERS]
        first = [n for n in samplers if not any(m != n and m in samplers for m in graph.upstream(n))]
        if not first:
            raise invalid("workflow", "no sampler", f"one with a {', '.join(sorted(_SAMPLERS))}")
        # Of several, the one whose result goes furthest.
        return max(first, key=lambda n: sum(n in graph.upstream(m) for m in graph.nodes))

    def _final_picture(self, graph: _Graph) -> Any:
        """The link of the last picture that comes out of the sampler; None if none does."""
        found: list[tuple[int, Any]] = []
        for node in graph.nodes:
            if not self.info.get(graph.kind(node), {}).get("output_node"):
                continue
            for name, source, output in graph.links(node):
                above = graph.upstream(source)
                if graph.type_of(source, output) == "IMAGE" and self.sampler in above:
                    found.append((len(above), graph.inputs(node)[name]))
        return max(found, key=lambda entry: entry[0])[1] if found else None

    def _model_chain(self, graph: _Graph) -> list[tuple[str, int]]:
        """(node, output) of the model, from the sampler to the loader."""
        link = self._sampler_link(graph, "model")
        chain: list[tuple[str, int]] = []
        while graph.is_link(link):
            node, output = graph.source(link)
            if (node, output) in chain:
                break
            chain.append((node, output))
            models = [
                n for n, source, index in graph.links(node) if graph.type_of(*graph.source([source, index])) == "MODEL"
            ]
            link = graph.inputs(node)[models[0]] if models else None
        return chain

    def _sampler_link(self, graph: _Graph, name: str) -> Any:
        """The sampler's link of that name, or its guider's."""
        inputs = graph.inputs(self.sampler)
        if graph.is_link(inputs.get("guider")):
            guider = graph.inputs(graph.source(inputs["guider"])[0])
            aliases = {"positive": ("positive", "conditioning", "cond1")}.get(name, (name,))
            inputs = {name: next((guider[a] for a in aliases if a in guider), None), **inputs}
        return inputs.get(name)

    def _is_regional(self, graph: _Graph, node: str) -> bool:
        kind = graph.kind(node)
        if kind in _REGIONAL:
            return True
        if kind in _PREPARING or not _REGIONAL_NAME.search(kind):
            return False
        types = graph.output_types(node)
        return bool({"MODEL", "CONDITIONING"} & set(types)) and bool(graph.by_type(node))

    def _decoded(self, graph: _Graph) -> tuple[Any, Any]:
        """(picture link, latent link) of the first sampler; the picture is None where no VAE is connected."""
        outputs = [index for other, name, index in graph._outgoing(self.sampler)]
        latent = [self.sampler, outputs[0] if outputs else 0]
        vae = None
        for node in graph.nodes:
            for name, source, index in graph.links(node):
                if graph.type_of(source, index) == "VAE":
                    vae = vae or graph.inputs(node)[name]
                    if name == "vae" and graph.kind(node) == "VAEDecode":
                        vae = graph.inputs(node)[name]
        if vae is None:
            return None, latent
        return [graph.add("VAEDecode", samples=latent, vae=list(vae)), 0], latent

    def _seed(self, graph: _Graph) -> int:
        inputs = graph.inputs(self.sampler)
        if graph.is_link(inputs.get("noise")):
            inputs = graph.inputs(graph.source(inputs["noise"])[0])
        for name in ("seed", "noise_seed"):
            value = graph.value(inputs.get(name))
            if isinstance(value, int):
                return value
        return 1

    # ---- the tests

    def _workflow(self) -> Ablation:
        graph = self.graph()
        latent = next((graph.inputs(n)["samples"] for n in graph.nodes if graph.kind(n) == "SaveLatent"), None)
        picture = self.final
        if picture is None and latent is None:
            picture, latent = self._decoded(graph)
        return Ablation("workflow", graph.finish(picture, latent))

    def _first_pass(self) -> Ablation:
        graph = self.graph()
        if self.final is not None:
            decoder, _ = graph.source(self.final)
            samples = graph.inputs(decoder).get("samples")
            decodes = graph.kind(decoder).startswith("VAEDecode") and graph.is_link(samples)
            if decodes and graph.source(samples)[0] == self.sampler:
                why = "the last picture is the first sampler's"
                return Ablation("first_pass", None, why=why, same_as="workflow")
        elif any(graph.kind(n) == "SaveLatent" for n, _ in graph.consumers(self.sampler)):
            return Ablation("first_pass", None, why="the latent is the first sampler's", same_as="workflow")
        return Ablation("first_pass", graph.finish(*self._decoded(graph)))

    def _changed(self, test: str, same_as: str | None, *steps: _Step, base: Sequence[_Step] = ()) -> Ablation:
        """The first pass after the steps of `base` and then `steps`, which are what is tested.

        Each changes the graph or returns why there is nothing to change.
        """
        graph = self.graph()
        for step in base:
            step(graph)
        before = len(graph.changes)
        reasons = [step(graph) for step in steps]
        if len(graph.changes) == before:
            if test == "regions_off" and self.regional:
                same_as = None  # they are still on
            return Ablation(test, None, why="; ".join(filter(None, reasons)) or "nothing to change", same_as=same_as)
        return Ablation(test, graph.finish(*self._decoded(graph)), tuple(graph.changes))

    def _regions_off(self, graph: _Graph) -> str | None:
        stuck = []
        for node in self.regional:
            names = _REGIONAL.get(graph.kind(node))
            mapping = dict(enumerate(names)) if names else graph.by_type(node)
            if not graph.bypass(node, mapping):
                stuck.append(f"node {node} ({graph.kind(node)}) cannot be left out")
        return "; ".join(stuck) or "there are no regional nodes"

    def _zero_strength(self, graph: _Graph) -> str | None:
        nodes = [
            n
            for n in graph.upstream(self.sampler)
            if (graph.kind(n) in _STRENGTH or n in self.regional)
            and "strength" in {*graph.inputs(n), *self._known_inputs(graph, n)}
        ]
        for node in nodes:
            graph.set(node, strength=0.0)
        if not self.regional:
            return "there are no regional nodes"
        return "the strength is zero already" if nodes else "the regional nodes have no strength"

    def _shift(self, graph: _Graph) -> str | None:
        """Shift 3.0 on the loader's model, for the sampler and for all others that take it."""
        patches = [
            n for n in graph.upstream(self.sampler) if _SAMPLING.search(graph.kind(n)) and "model" in graph.inputs(n)
        ]
        used = [n for n in patches if graph.consumers(n)]
        right = [
            n
            for n in used
            if graph.value(graph.inputs(n).get("shift")) == self.official.shift
            and graph.kind(n) == "ModelSamplingAuraFlow"
            and graph.source(graph.inputs(n)["model"]) == self.root
            and [other for other, _ in graph.consumers(*self.root)] == [n]
        ]
        if right and used == right:
            return f"the model has ModelSamplingAuraFlow with {self.official.shift} already, for all that take it"
        if "ModelSamplingAuraFlow" not in self.info:
            return "this server has no ModelSamplingAuraFlow"
        for node in patches:
            graph.bypass(node, {0: "model"})
        consumers = [(n, name) for n, name in graph.consumers(*self.root) if n not in patches]
        node = graph.add("ModelSamplingAuraFlow", model=list(self.root), shift=self.official.shift)
        for other, name in consumers:
            graph.inputs(other)[name] = [node, 0]
        graph.changes.append(f"ModelSamplingAuraFlow, shift {self.official.shift}, after node {self.root[0]}")
        return None

    def _settings(self, graph: _Graph) -> str | None:
        """The sampler becomes the official KSampler; the latent, the conditionings and the seed stay."""
        o = self.official
        steps, cfg = (o.turbo_steps, o.turbo_cfg) if self.turbo else (o.steps, o.cfg)
        wanted = {"steps": steps, "cfg": cfg, "sampler_name": o.sampler, "scheduler": o.scheduler, "denoise": 1.0}
        if graph.kind(self.sampler) == "KSampler":
            inputs = graph.inputs(self.sampler)
            if all(graph.value(inputs.get(name)) == value for name, value in wanted.items()):
                return "the sampler's settings are the official ones"
            graph.set(self.sampler, **wanted)
            return None
        links = {name: self._sampler_link(graph, name) for name in ("model", "positive", "negative")}
        links["latent_image"] = graph.inputs(self.sampler).get("latent_image")
        if not graph.is_link(links["negative"]):
            links["negative"] = links["positive"]  # a guider without one; it counts for nothing at CFG 1 only
        seed = self._seed(graph)
        told = f"KSampler, {o.sampler}, {o.scheduler}, {steps} steps, CFG {cfg}"
        graph.changes.append(f"node {self.sampler} ({graph.kind(self.sampler)}): {told}")
        # All outputs of the samplers replaced are latents; KSampler has one.
        for other, name, _ in graph._outgoing(self.sampler):
            graph.inputs(other)[name] = [self.sampler, 0]
        graph.nodes[self.sampler] = {"class_type": "KSampler", "inputs": {**links, "seed": seed, **wanted}}
        return None

    def _resolution(self, graph: _Graph) -> str | None:
        width, height = self.official.size
        node, _ = graph.source(graph.inputs(self.sampler)["latent_image"])
        inputs = graph.inputs(node)
        if not {"width", "height"} <= set(inputs) or any(
            graph.type_of(s, i) == "LATENT" for _, s, i in graph.links(node)
        ):
            return f"the latent is made from a picture or another latent (node {node}, {graph.kind(node)})"
        sizes = [graph.value(inputs[name]) for name in ("width", "height")]
        if all(isinstance(n, (int, float)) for n in sizes):
            area = sizes[0] * sizes[1] / (width * height)
            if 0.85 <= area <= 1.2 and not any(n % 16 for n in sizes):
                return f"it is {sizes[0]} x {sizes[1]} already"
        graph.set(node, width=width, height=height)
        return None

    def _shapes(self, graph: _Graph) -> str | None:
        able = [(n, name) for n in self.regional for name in _DEBUG if name in self._known_inputs(graph, n)]
        if not able:
            return "the regional nodes have no debug switch" if self.regional else "there are no regional nodes"
        for node, name in able:
            if graph.inputs(node).get(name) is not True:
                graph.set(node, **{name: True})
        steps = graph.value(graph.inputs(self.sampler).get("steps"))
        if isinstance(steps, int) and steps > _SHAPE_STEPS:
            graph.set(self.sampler, steps=_SHAPE_STEPS)
        if not graph.changes:
            graph.changes.append("nothing: its debug switch is on")
        return None

    def _known_inputs(self, graph: _Graph, node: str) -> set[str]:
        groups = self.info.get(graph.kind(node), {}).get("input", {})
        return {name for group in groups.values() if isinstance(group, dict) for name in group}

    def _attention_off(self, graph: _Graph) -> str | None:
        """Without the model's other patches (LoRAs stay), and with PyTorch's attention where a node can choose it."""
        for node, _ in self.chain[:-1]:
            kind = graph.kind(node)
            if node not in self.regional and not _LORA.search(kind) and not _SAMPLING.search(kind):
                graph.bypass(node, graph.by_type(node))
        present = [n for n in self.regional if graph.consumers(n)]
        for node in present:
            backend = graph.inputs(node).get("attention_backend", "orig")
            if "attention_backend" in self._known_inputs(graph, node) and backend == "orig":
                graph.set(node, attention_backend="basic")
        widget, pytorch = self._pytorch_attention()
        if widget and not any(graph.kind(n) in _ON_CONDITIONING for n in present):
            consumers = graph.consumers(*self.root)
            node = graph.add("ModelAttentionBackend", **{"model": list(self.root), widget: pytorch})
            for other, name in consumers:
                graph.inputs(other)[name] = [node, 0]
            graph.changes.append(f"ModelAttentionBackend, {pytorch}, after node {self.root[0]}")
        return "no other node patches the model, and this server lets no node choose its attention"

    def _pytorch_attention(self) -> tuple[str, str]:
        """The widget of ModelAttentionBackend that names the attention, and what PyTorch's is called there."""
        for group in self.info.get("ModelAttentionBackend", {}).get("input", {}).values():
            for widget in group if isinstance(group, dict) else ():
                for choice in self._choices("ModelAttentionBackend", widget):
                    if re.match(r"pytorch|sdpa", choice, re.IGNORECASE):
                        return widget, choice
        return "", ""

    # ---- the official graph

    def _baselines(self) -> tuple[Ablation, Ablation]:
        o = self.official
        files = {
            "UNETLoader": ("unet_name", o.model),
            "CLIPLoader": ("clip_name", o.clip),
            "VAELoader": ("vae_name", o.vae),
        }
        found = {kind: self._file(kind, name, file) for kind, (name, file) in files.items()}
        own, changes = self._official_graph(None)
        lacking = [files[kind][1] for kind, file in found.items() if file is None]
        if lacking:
            note = f"this server has no {', '.join(lacking)}: with the workflow's own files"
            baseline = Ablation("baseline", own, (note, *changes))
            why = "the baseline has the workflow's own files"
            return baseline, Ablation("files", None, why=why, same_as="baseline")
        theirs, _ = self._official_graph({kind: str(file) for kind, file in found.items()})
        used = {str(v) for n in own.values() for v in n["inputs"].values() if isinstance(v, str)}
        if all(str(file) in used for file in found.values()):
            why = "the workflow's files are the official ones"
            return Ablation("baseline", theirs), Ablation("files", None, why=why, same_as="baseline")
        return Ablation("baseline", theirs), Ablation("files", own, tuple(changes))

    def _official_graph(self, files: Mapping[str, str] | None) -> tuple[Prompt, list[str]]:
        """The official chain with official files, or with the workflow's own loaders, and what had to stand in."""
        o, graph, notes = self.official, self.graph(), list[str]()
        seed = self._seed(graph)
        if files is not None:
            graph.nodes = {}
            model = [graph.add("UNETLoader", unet_name=files["UNETLoader"], weight_dtype="default"), 0]
            clip: Any = [graph.add("CLIPLoader", clip_name=files["CLIPLoader"], type="stable_diffusion"), 0]
            vae: Any = [graph.add("VAELoader", vae_name=files["VAELoader"]), 0]
            positive = negative = None
        else:
            model = list(self.root)
            texts = [self._text_source(graph, self._sampler_link(graph, name)) for name in ("positive", "negative")]
            clip = next((graph.inputs(t[0])["clip"] for t in texts if t and "clip" in graph.inputs(t[0])), None)
            positive, negative = (list(t) if t else None for t in texts)
            vae = next(
                (
                    graph.inputs(n)[name]
                    for n in graph.nodes
                    for name, source, index in graph.links(n)
                    if graph.type_of(source, index) == "VAE"
                ),
                None,
            )
        if clip is not None:
            positive = [graph.add("CLIPTextEncode", clip=list(clip), text=o.text), 0]
            negative = [graph.add("CLIPTextEncode", clip=list(clip), text=o.negative), 0]
        else:
            notes.append("the workflow's own prompts, since no text encoder is connected")
        latent = [graph.add("EmptyLatentImage", width=o.size[0], height=o.size[1], batch_size=1), 0]
        sampler = graph.add(
            "KSampler",
            model=model,
            positive=positive,
            negative=negative or positive,
            latent_image=latent,
            seed=seed,
            steps=o.steps,
            cfg=o.cfg,
            sampler_name=o.sampler,
            scheduler=o.scheduler,
            denoise=1.0,
        )
        picture = None if vae is None else [graph.add("VAEDecode", samples=[sampler, 0], vae=list(vae)), 0]
        return graph.finish(picture, [sampler, 0]), notes

    def _text_source(self, graph: _Graph, link: Any) -> tuple[str, int] | None:
        """The node at which a conditioning begins."""
        seen = set()
        while graph.is_link(link):
            node, output = graph.source(link)
            if node in seen:
                return None
            seen.add(node)
            before = [n for n, s, i in graph.links(node) if graph.type_of(*graph.source([s, i])) == "CONDITIONING"]
            if not before:
                return node, output
            names = _REGIONAL.get(graph.kind(node), ())
            wanted = names[output] if output < len(names) else before[0]
            link = graph.inputs(node).get(wanted, graph.inputs(node)[before[0]])
        return None

    def _file(self, kind: str, widget: str, file: str) -> str | None:
        """The server's name of a file, in whatever folder it is."""
        return next((c for c in self._choices(kind, widget) if PurePosixPath(c.replace("\\", "/")).name == file), None)

    def _choices(self, kind: str, widget: str) -> list[str]:
        """What a combo box offers, in the old form (a list first) and the new one (options)."""
        for group in self.info.get(kind, {}).get("input", {}).values():
            spec = group.get(widget) if isinstance(group, dict) else None
            if isinstance(spec, (list, tuple)) and spec:
                if isinstance(spec[0], (list, tuple)):
                    return [str(c) for c in spec[0]]
                options = spec[1].get("options") if len(spec) > 1 and isinstance(spec[1], dict) else None
                return [str(c) for c in options or []]
        return []
