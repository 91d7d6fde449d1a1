"""ComfyUI workflows, read into one graph: the API form, the user interface's form, and either of them inside a PNG.

    workflow = read("anima.json")
    workflow.nodes["90:76"].inputs["model"]      Link("90:84", 0): the output 0 of node 84 in subgraph node 90
    workflow.value("90:76", "cfg")               4, whichever primitives and switches it comes through
    workflow.to_api(object_info)                 what POST /prompt takes

The user interface's form is resolved as its own "export (API)" does: subgraphs are entered (a node in one is named
`host:node`), reroutes, Get/Set pairs and primitive nodes are followed, muted nodes are left out and bypassed ones are
short-circuited by type. What ComfyUI resolves while it runs (`ComfySwitchNode`, `Primitive*`) stays in the graph;
`follow` and `value` see through it.
"""

from __future__ import annotations

import copy
import io
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .node_types import CONTROL_AFTER_GENERATE, FRONTEND_ONLY, OUTPUT_NODES, PRIMITIVES, REROUTES, SEEDS, WIDGETS

__all__ = ["UNKNOWN", "Link", "Node", "Place", "Workflow", "WorkflowError", "read", "read_text"]

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
MUTED, BYPASSED = 2, 4
_MOST_NODES = 100_000  # after subgraphs are entered; a file can nest them to any power
_MOST_HOPS = 10_000  # reroutes and switches in a row


_WIDGET_TYPES = frozenset({"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "COMFY_DYNAMICCOMBO_V3"})
#: Widgets of a kind of their own, which no output can be connected to.
_WIDGET_TYPES |= {"AUDIO_RECORD", "COLOR", "IMAGECOMPARE", "LOAD_3D", "WEBCAM"}


class WorkflowError(ValueError):
    """The file cannot be read as a workflow; the message says what it is instead."""


class _Unknown:
    """The value of an input that something computes when the workflow runs."""

    def __repr__(self) -> str:
        return "computed"

    def __bool__(self) -> bool:
        return False


UNKNOWN = _Unknown()

#: Where a value stands in the file's JSON: a container of it and the index or key.
Place = tuple[Any, Any]


@dataclass(frozen=True)
class Link:
    """An output of a node."""

    node: str
    slot: int


@dataclass
class Node:
    """One node that takes part in a run. `inputs` holds a `Link` or a value each."""

    id: str
    class_type: str
    inputs: dict[str, Any]
    title: str = ""
    places: dict[str, Place] = field(default_factory=dict)
    raw: dict[str, Any] = field(default_factory=dict)

    def links(self) -> Iterator[tuple[str, Link]]:
        """The inputs that come from other nodes."""
        for name, value in self.inputs.items():
            if isinstance(value, Link):
                yield name, value

    def __str__(self) -> str:
        return f"{self.class_type} {self.id}"


@dataclass
class Workflow:
    """A workflow's nodes, by id, and how its file says them.

    `kind` is "api" or "ui"; `raw` the workflow's own JSON, `document` that of the whole file (some wrap one in "prompt"
    or "workflow"), both of which `Node.places` points into: a change there is a change of the file. `image` is the
    pixel size of the PNG it was in; `skipped` the nodes that are muted or bypassed; `dangling` the inputs whose link
    leads nowhere, as (node, input); `unnamed` the nodes whose values could not be named.
    """

    path: str
    kind: str
    raw: Any
    nodes: dict[str, Node]
    object_info: Mapping[str, Any] | None = None
    document: Any = None
    skipped: dict[str, int] = field(default_factory=dict)
    dangling: list[tuple[str, str]] = field(default_factory=list)
    unnamed: list[str] = field(default_factory=list)
    image: tuple[int, int] | None = None

    def follow(self, link: Link | None) -> Link | None:
        """The output that a link stands for once switches with a known position are passed; None if there is none."""
        for _ in range(_MOST_HOPS):
            node = self.nodes.get(link.node) if link else None
            if node is None:
                return None
            if node.class_type != "ComfySwitchNode":
                return link
            position = self.value(node.id, "switch")
            if position is UNKNOWN:
                return link
            chosen = node.inputs.get("on_true" if position else "on_false")
            if not isinstance(chosen, Link):
                return None
            link = chosen
        return None

    def source(self, node: str, name: str) -> Node | None:
        """The node that an input comes from, switches passed; None if it is not linked."""
        value = self.nodes[node].inputs.get(name)
        found = self.follow(value) if isinstance(value, Link) else None
        return self.nodes[found.node] if found else None

    def value(self, node: str, name: str, default: Any = None, depth: int = 0) -> Any:
        """An input's value, through primitives and switches; UNKNOWN if it is computed when the workflow runs."""
        return self.setting(node, name, default, depth)[0]

    def setting(self, node: str, name: str, default: Any = None, depth: int = 0) -> tuple[Any, tuple[Node, str] | None]:
        """As `value`, with the node and the input that set it (None where nothing does)."""
        owner = self.nodes[node]
        if name not in owner.inputs:
            return default, None
        value = owner.inputs[name]
        if not isinstance(value, Link):
            return value, (owner, name)
        found = self.follow(value) if depth < 50 else None
        if found is None:
            # A switch that chooses a widget of its own.
            chosen = self.nodes.get(value.node)
            if depth < 50 and chosen is not None and chosen.class_type == "ComfySwitchNode":
                position = self.value(chosen.id, "switch", None, depth + 1)
                if position is not UNKNOWN:
                    return self.setting(chosen.id, "on_true" if position else "on_false", default, depth + 1)
            return UNKNOWN, None
        origin = self.nodes[found.node]
        if origin.class_type in PRIMITIVES:
            return self.setting(origin.id, "value", default, depth + 1)
        if origin.class_type == "ResolutionSelector":
            return self._selected_resolution(origin, depth + 1)[found.slot], None
        return UNKNOWN, None

    def _selected_resolution(self, node: Node, depth: int) -> tuple[Any, Any]:
        """Width and height of a ResolutionSelector: its share of the pixels by the ratio, on a multiple."""
        ratio, megapixels, multiple = (
            self.value(node.id, name, None, depth) for name in ("aspect_ratio", "megapixels", "multiple")
        )
        try:
            width, height = (float(part) for part in str(ratio).split()[0].split(":"))
            unit = math.sqrt(megapixels * 2**20 / (width * height))
            return round(width * unit / multiple) * multiple, round(height * unit / multiple) * multiple
        except (ValueError, IndexError, TypeError, ZeroDivisionError):
            return UNKNOWN, UNKNOWN

    def consumers(self) -> dict[str, list[tuple[str, str, int]]]:
        """For each node, who reads it: (node, input, output slot)."""
        readers: dict[str, list[tuple[str, str, int]]] = {node: [] for node in self.nodes}
        for node in self.nodes.values():
            for name, link in node.links():
                if link.node in readers:
                    readers[link.node].append((node.id, name, link.slot))
        return readers

    def outputs(self) -> list[str]:
        """The nodes for whose sake the workflow runs. A node nobody knows is one if nobody reads it."""
        info = self.object_info or {}
        readers = self.consumers()
        found = []
        for node in self.nodes.values():
            known = node.class_type in info or node.class_type in WIDGETS
            ends_here = not known and not readers[node.id] and any(node.links())
            if ends_here or info.get(node.class_type, {}).get("output_node") or node.class_type in OUTPUT_NODES:
                found.append(node.id)
        return found

    def live(self) -> set[str]:
        """The nodes that a run reaches: from the outputs back, through the chosen side of each switch only."""
        reached: set[str] = set()
        waiting = self.outputs() or list(self.nodes)
        while waiting:
            name = waiting.pop()
            if name in reached or name not in self.nodes:
                continue
            reached.add(name)
            node = self.nodes[name]
            skipped = None
            if node.class_type == "ComfySwitchNode":
                position = self.value(name, "switch")
                skipped = None if position is UNKNOWN else "on_false" if position else "on_true"
            waiting.extend(link.node for key, link in node.links() if key != skipped)
        return reached

    def ancestors(self, start: str) -> set[str]:
        """A node and all that it depends on in a run."""
        reached: set[str] = set()
        waiting = [start]
        while waiting:
            name = waiting.pop()
            if name in reached or name not in self.nodes:
                continue
            reached.add(name)
            for key, link in self.nodes[name].links():
                if self.nodes[name].class_type == "ComfySwitchNode" and key != "switch":
                    position = self.value(name, "switch")
                    if position is not UNKNOWN and key != ("on_true" if position else "on_false"):
                        continue
                waiting.append(link.node)
        return reached

    def cycle(self) -> list[str]:
        """Nodes that depend on themselves, in their order around the circle; empty if there are none."""
        state: dict[str, int] = {}  # 1: on the path being walked, 2: done
        for root in self.nodes:
            if root in state:
                continue
            path: list[str] = []
            stack: list[tuple[str, Iterator[tuple[str, Link]]]] = []
            state[root] = 1
            path.append(root)
            stack.append((root, self.nodes[root].links()))
            while stack:
                name, links = stack[-1]
                for _, link in links:
                    if link.node not in self.nodes:
                        continue
                    if state.get(link.node) == 1:
                        return path[path.index(link.node) :]
                    if link.node not in state:
                        state[link.node] = 1
                        path.append(link.node)
                        stack.append((link.node, self.nodes[link.node].links()))
                        break
                else:
                    state[name] = 2
                    path.pop()
                    stack.pop()
        return []

    def to_api(self, object_info: Mapping[str, Any] | None = None) -> dict[str, dict[str, Any]]:
        """The prompt for a server: `{id: {"class_type": …, "inputs": …}}`, links as `[id, slot]`.

        With the server's `object_info`, every widget has its name and nodes that it does not know and no output needs
        are left out. Raises `WorkflowError` for a needed node that cannot be said: unknown there, or without it a
        node of the user interface's form whose widgets nobody can name.
        """
        read_by_it = self
        if object_info is not None and self.kind == "ui":
            read_by_it = _from_ui(self.path, self.raw, object_info)
        live = read_by_it.live()
        every = read_by_it.nodes.values()
        missing = [] if object_info is None else [node for node in every if node.class_type not in object_info]
        needed = sorted({str(node) for node in missing if node.id in live})
        if needed:
            raise WorkflowError(f"{self.path}: the server does not have {_few(needed)}: install the pack or remove it")
        unnamed = sorted(set(read_by_it.unnamed) & live)
        if unnamed:
            nodes = _few([str(read_by_it.nodes[node]) for node in unnamed])
            raise WorkflowError(
                f"{self.path}: the widgets of {nodes} have no names: export it as API, or name a server"
            )
        left_out = {node.id for node in missing}
        return {
            node.id: {
                "class_type": node.class_type,
                "inputs": {
                    name: [value.node, value.slot] if isinstance(value, Link) else copy.deepcopy(value)
                    for name, value in node.inputs.items()
                    if not (isinstance(value, Link) and value.node in left_out)
                },
                **({"_meta": {"title": node.title}} if node.title else {}),
            }
            for node in every
            if node.id not in left_out
        }


def read(path: str | Path, object_info: Mapping[str, Any] | None = None) -> Workflow:
    """The workflow of a file: `.json` in either form, or a PNG that ComfyUI saved (its prompt, as it was run).

    `object_info` is a server's answer to GET /object_info; it names the widgets of nodes that are not known here.
    Raises `WorkflowError` for what is no workflow, `OSError` for what cannot be opened.
    """
    data = Path(path).read_bytes()
    name = Path(path).name
    image = None
    if data.startswith(PNG_SIGNATURE):
        raw, image = _from_png(name, data)
    else:
        raw = _parse(name, data)
    workflow = _from_json(name, raw, object_info)
    workflow.image = image
    return workflow


def read_text(name: str, text: str, object_info: Mapping[str, Any] | None = None) -> Workflow:
    """As `read`, of JSON text; `name` is what errors call it."""
    return _from_json(name, _parse(name, text.encode()), object_info)


def _from_json(name: str, raw: Any, object_info: Mapping[str, Any] | None) -> Workflow:
    form, content = _form(name, raw)
    if form == "ui":
        workflow = _from_ui(name, content, object_info)
    else:
        workflow = _from_api(name, content)
        workflow.object_info = object_info
    workflow.document = raw
    return workflow


def _parse(name: str, data: bytes) -> Any:
    try:
        return json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise WorkflowError(f"{name}: neither JSON nor a PNG") from error
    except json.JSONDecodeError as error:
        raise WorkflowError(f"{name}: not JSON: {error.msg} in line {error.lineno}, column {error.colno}") from error
    except RecursionError as error:
        raise WorkflowError(f"{name}: JSON nested too deep for a workflow") from error


def _from_png(name: str, data: bytes) -> tuple[Any, tuple[int, int]]:
    """The workflow in a PNG's text, and the picture's size."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as picture:
            picture.load()  # text may stand behind the pixels
            size, text = picture.size, dict(picture.info)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise WorkflowError(f"{name}: a damaged PNG: {error}") from error
    for key in ("prompt", "workflow"):
        if isinstance(text.get(key), str):
            return _parse(f"{name} ({key})", text[key].encode()), size
    raise WorkflowError(f"{name}: a PNG without a workflow: ComfyUI's SaveImage writes one, image editors remove it")


def _form(name: str, raw: Any) -> tuple[str, dict[str, Any]]:
    """Which form it is, and the part of the file that holds it."""
    for inner in (raw, *(raw.get(key) for key in ("prompt", "workflow") if isinstance(raw, dict))):
        if not isinstance(inner, dict):
            continue
        if isinstance(inner.get("nodes"), list):
            return "ui", inner
        if any(isinstance(node, dict) and "class_type" in node for node in inner.values()):
            return "api", inner
    if isinstance(raw, dict):
        keys = ", ".join(map(str, list(raw)[:5])) or "nothing"
        what = f"a JSON object with {keys}"
    else:
        what = f"JSON, but a {type(raw).__name__}"
    raise WorkflowError(f"{name}: not a ComfyUI workflow: {what}; allowed: nodes with class_type, or a list of nodes")


def _from_api(name: str, raw: dict[str, Any]) -> Workflow:
    workflow = Workflow(name, "api", raw, {})
    for key, entry in raw.items():
        if not isinstance(entry, dict) or not isinstance(entry.get("class_type"), str):
            raise WorkflowError(f"{name}: node {key}: no class_type")
        widgets = entry.get("inputs", {})
        if not isinstance(widgets, dict):
            raise WorkflowError(f"{name}: node {key}: inputs: got {type(widgets).__name__}; allowed: an object")
        meta = entry.get("_meta")
        node = Node(str(key), entry["class_type"], {}, str(meta.get("title", "")) if isinstance(meta, dict) else "")
        node.raw = entry
        for item, value in widgets.items():
            if isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and isinstance(value[1], int):
                node.inputs[item] = Link(value[0], value[1])
                if value[0] not in raw:
                    workflow.dangling.append((node.id, item))
            else:
                node.inputs[item] = value
            node.places[item] = (widgets, item)
        workflow.nodes[node.id] = node
    return workflow


@dataclass
class _Scope:
    """The root graph, or a subgraph as one host node shows it."""

    prefix: str
    graph: dict[str, Any]
    nodes: dict[Any, dict[str, Any]]
    links: dict[Any, tuple[Any, int]]  # link -> its origin
    parent: _Scope | None = None
    host: dict[str, Any] | None = None
    children: dict[Any, _Scope] = field(default_factory=dict)
    promoted: dict[str, tuple[Any, Place]] = field(default_factory=dict)
    named: dict[str, dict[str, Any]] | None = None  # SetNodes

    @property
    def input_id(self) -> Any:
        described = self.graph.get("inputNode")
        return (described.get("id", -10) if isinstance(described, dict) else -10) if self.host else None


@dataclass
class _Value:
    value: Any
    place: Place | None


def _from_ui(name: str, raw: dict[str, Any], object_info: Mapping[str, Any] | None) -> Workflow:
    workflow = Workflow(name, "ui", raw, {}, object_info)
    definitions: dict[str, dict[str, Any]] = {}
    described = raw.get("definitions")
    for definition in _list(described.get("subgraphs")) if isinstance(described, dict) else []:
        if not isinstance(definition, dict) or not isinstance(definition.get("nodes"), list):
            raise WorkflowError(f"{name}: definitions.subgraphs: an entry without nodes")
        definitions[str(definition.get("id"))] = definition
    root = _scope(name, "", raw, None, None)
    waiting, scopes, total = [(root, frozenset[str]())], [], 0
    while waiting:
        scope, inside = waiting.pop()
        scopes.append(scope)
        total += len(scope.nodes)
        if total > _MOST_NODES:
            raise WorkflowError(f"{name}: over {_MOST_NODES} nodes once its subgraphs are entered")
        for key, node in scope.nodes.items():
            kind = str(node["type"])
            if kind not in definitions or _mode(node) in (MUTED, BYPASSED):
                continue
            if kind in inside:
                raise WorkflowError(f"{name}: subgraph {definitions[kind].get('name') or kind} contains itself")
            child = _scope(name, f"{scope.prefix}{key}:", definitions[kind], scope, node)
            child.promoted = _promoted(child)
            scope.children[key] = child
            waiting.append((child, inside | {kind}))
    for scope in scopes:
        for key, node in scope.nodes.items():
            kind, flat = str(node["type"]), f"{scope.prefix}{key}"
            if _mode(node) in (MUTED, BYPASSED):
                workflow.skipped[flat] = _mode(node)
            elif kind not in definitions and kind not in FRONTEND_ONLY:
                workflow.nodes[flat] = _ui_node(workflow, scope, flat, node)
    return workflow


def _scope(name: str, prefix: str, graph: dict[str, Any], parent: _Scope | None, host: dict[str, Any] | None) -> _Scope:
    nodes: dict[Any, dict[str, Any]] = {}
    for node in graph["nodes"]:
        if not isinstance(node, dict) or "id" not in node or not isinstance(node.get("type"), str):
            raise WorkflowError(
                f"{name}: {f'subgraph node {prefix[:-1]}: ' if prefix else ''}a node without id or type"
            )
        if not isinstance(node["id"], (int, str)) or node["id"] in nodes:
            raise WorkflowError(f"{name}: two nodes, or one that is no number, have the id {prefix}{node['id']}")
        nodes[node["id"]] = node
    links: dict[Any, tuple[Any, int]] = {}
    for link in _list(graph.get("links")):
        number, origin, slot = _ends(link)[:3]
        if number is not None and isinstance(slot, int) and slot >= 0:
            links[number] = (origin, slot)
    return _Scope(prefix, graph, nodes, links, parent, host)


def _ends(link: Any) -> tuple[Any, Any, Any, Any, Any]:
    """(id, origin, its output, target, its input) of a link, Nones for what is not one."""
    if isinstance(link, dict):
        ends = [link.get(name) for name in ("id", "origin_id", "origin_slot", "target_id", "target_slot")]
    else:
        ends = link[:5] if isinstance(link, list) and len(link) >= 5 else [None] * 5
    number, origin, slot, target, to = (end if isinstance(end, (int, str)) else None for end in ends)
    return number, origin, slot, target, to


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _mode(node: dict[str, Any]) -> int:
    mode = node.get("mode")
    return mode if isinstance(mode, int) else 0


def _entries(owner: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    """A list of objects, such as a node's inputs; what is no object is an empty one, so that places stay."""
    return [entry if isinstance(entry, dict) else {} for entry in _list(owner.get(name))]


def _promoted(scope: _Scope) -> dict[str, tuple[Any, Place]]:
    """Widgets of a subgraph that its host shows: the host's values are in the order of the subgraph's inputs that
    end in a widget. Hosts without values leave those of the nodes inside."""
    values = (scope.host or {}).get("widgets_values")
    if not isinstance(values, list) or not values:
        return {}
    targets = {}
    for link in _list(scope.graph.get("links")):
        number, _, _, target, to = _ends(link)
        targets[number] = (target, to)
    names = []
    for entry in _entries(scope.graph, "inputs"):
        for link in _list(entry.get("linkIds")):
            node, slot = targets.get(link if isinstance(link, (int, str)) else None, (None, None))
            slots = _entries(scope.nodes.get(node, {}), "inputs")
            if isinstance(slot, int) and slot < len(slots) and slots[slot].get("widget"):
                names.append(str(entry.get("name")))
                break
    if len(names) != len(values):
        return {}
    return {name: (value, (values, index)) for index, (name, value) in enumerate(zip(names, values, strict=True))}


def _ui_node(workflow: Workflow, scope: _Scope, flat: str, raw: dict[str, Any]) -> Node:
    node = Node(flat, str(raw["type"]), {}, str(raw.get("title") or ""), raw=raw)
    for name, value, place in _widgets(workflow, flat, raw):
        node.inputs[name] = value
        if place is not None:
            node.places[name] = place
    for entry in _entries(raw, "inputs"):
        if entry.get("link") is None or "name" not in entry:
            continue
        name = str(entry.get("name"))
        origin = _resolve(workflow, scope, entry["link"], flat, name)
        if isinstance(origin, Link):
            node.inputs[name] = origin
        elif origin is not None:
            node.inputs[name] = origin.value
            if origin.place is not None:
                node.places[name] = origin.place
    return node


def _resolve(workflow: Workflow, scope: _Scope, link: Any, flat: str, name: str) -> Link | _Value | None:
    """What a link of the user interface's graph carries: a server node's output, a value, or nothing."""
    for _ in range(_MOST_HOPS):
        if link is None:
            return None
        if not isinstance(link, (int, str)) or link not in scope.links:
            workflow.dangling.append((flat, name))
            return None
        origin, slot = scope.links[link]
        if scope.host is not None and scope.parent is not None and origin == scope.input_id:
            entries = _entries(scope.graph, "inputs")
            wanted = str(entries[slot].get("name")) if slot < len(entries) else ""
            outer = next((entry for entry in _entries(scope.host, "inputs") if entry.get("name") == wanted), None)
            if outer is not None and outer.get("link") is not None:
                scope, link = scope.parent, outer["link"]
                continue
            if wanted in scope.promoted:
                return _Value(*scope.promoted[wanted])
            return None
        node = scope.nodes.get(origin)
        if node is None:
            workflow.dangling.append((flat, name))
            return None
        kind = str(node["type"])
        if _mode(node) == MUTED:
            return None
        if _mode(node) == BYPASSED:
            link = _bypass(node, slot)
        elif origin in scope.children:
            child = scope.children[origin]
            ends = _entries(child.graph, "outputs")
            inner = _list(ends[slot].get("linkIds")) if slot < len(ends) else []
            scope, link = child, inner[0] if inner else None
        elif kind in REROUTES or kind == "SetNode":
            link = next((entry.get("link") for entry in _entries(node, "inputs")), None)
        elif kind == "GetNode":
            target = _set_node(scope, node)
            if target is None:
                workflow.dangling.append((flat, name))
                return None
            scope, link = target
        elif kind == "PrimitiveNode":
            values = node.get("widgets_values")
            return _Value(values[0], (values, 0)) if isinstance(values, list) and values else None
        else:
            return Link(f"{scope.prefix}{origin}", slot)
    raise WorkflowError(f"{workflow.path}: node {flat}, {name}: its link goes round in a circle")


def _bypass(node: dict[str, Any], slot: int) -> Any:
    """The link that a bypassed node passes on for one of its outputs: the input of the same place if its type fits,
    else the first that fits."""
    outputs, inputs = _entries(node, "outputs"), _entries(node, "inputs")
    kind = outputs[slot].get("type") if slot < len(outputs) else None
    order = ([inputs[slot]] if slot < len(inputs) else []) + inputs
    return next((entry.get("link") for entry in order if entry.get("type") in (kind, "*") or kind == "*"), None)


def _set_node(scope: _Scope, getter: dict[str, Any]) -> tuple[_Scope, Any] | None:
    """The link into the SetNode of the same name, in the getter's graph or one around it."""
    values = getter.get("widgets_values")
    wanted = str(values[0]) if isinstance(values, list) and values else ""
    here: _Scope | None = scope
    while here is not None:
        if here.named is None:
            here.named = {
                str(values[0]): node
                for node in here.nodes.values()
                if node["type"] == "SetNode" and isinstance(values := node.get("widgets_values"), list) and values
            }
        setter = here.named.get(wanted)
        if setter is not None:
            return here, next((entry.get("link") for entry in _entries(setter, "inputs")), None)
        here = here.parent
    return None


def _widgets(workflow: Workflow, flat: str, raw: dict[str, Any]) -> list[tuple[str, Any, Place | None]]:
    """The named values of a node of the user interface's form, with their places in the file."""
    values = raw.get("widgets_values")
    if isinstance(values, dict):
        return [(str(name), value, (values, name)) for name, value in values.items()]
    values = values if isinstance(values, list) else []
    kind = str(raw["type"])
    listed = [
        str(entry["widget"].get("name")) for entry in _entries(raw, "inputs") if isinstance(entry.get("widget"), dict)
    ]
    if workflow.object_info is not None and kind in workflow.object_info:
        return _widgets_by_schema(workflow.object_info[kind], values)
    if kind in WIDGETS:
        names = list(WIDGETS[kind])
    else:
        # Recent user interfaces list every widget among a node's inputs; older ones only those with a link.
        names = listed
        certain = len([value for value in values if not _is_control(value)]) <= len(names)
        if values and not certain:
            workflow.unnamed.append(flat)
            return []
    found: list[tuple[str, Any, Place | None]] = []
    index = 0
    for name in names:
        if index >= len(values):
            break
        found.append((name, values[index], (values, index)))
        index += 1
        if name in SEEDS and index < len(values) and _is_control(values[index]):
            index += 1
    return found


def _is_control(value: Any) -> bool:
    return isinstance(value, str) and value in CONTROL_AFTER_GENERATE


def _widgets_by_schema(schema: Mapping[str, Any], values: list[Any]) -> list[tuple[str, Any, Place | None]]:
    """Values named by a server's description of the node; widgets the file does not have get their default."""
    found: list[tuple[str, Any, Place | None]] = []
    index = 0
    inputs = schema.get("input") or {}
    waiting = [
        (name, spec) for group in ("required", "optional") for name, spec in reversed((inputs.get(group) or {}).items())
    ]
    # Required widgets come first; a dynamic choice puts those of its option right behind itself.
    required = len(inputs.get("required") or {})
    waiting = waiting[required:] + waiting[:required]
    while waiting:
        name, spec = waiting.pop()
        kind, options = (*spec, {})[:2] if isinstance(spec, (list, tuple)) and spec else (None, {})
        options = options if isinstance(options, dict) else {}
        if not _is_widget(kind, options):
            continue
        if index < len(values):
            value = values[index]
            found.append((name, value, (values, index)))
            index += 1
            seed = options.get("control_after_generate") or name in SEEDS
            if seed and index < len(values) and _is_control(values[index]):
                index += 1
        elif "default" in options or isinstance(kind, list) or options.get("options"):
            first = (kind if isinstance(kind, list) else options.get("options") or [None])[:1]
            fallback = first[0] if first else None
            value = options.get("default", fallback.get("key") if isinstance(fallback, dict) else fallback)
            found.append((name, value, None))
        elif kind not in ("INT", "FLOAT", "STRING", "BOOLEAN"):
            value = ""  # what the user interface draws by itself; a server wants the input to be there
            found.append((name, value, None))
        else:
            continue
        if kind == "COMFY_DYNAMICCOMBO_V3":
            option: dict[str, Any] = next(
                (entry for entry in options.get("options", []) if entry.get("key") == value), {}
            )
            nested = [
                (f"{name}.{inner}", inner_spec)
                for group in ("required", "optional")
                for inner, inner_spec in ((option.get("inputs") or {}).get(group) or {}).items()
            ]
            waiting.extend(reversed(nested))
    return found


def _is_widget(kind: Any, options: dict[str, Any]) -> bool:
    if options.get("forceInput") or options.get("rawLink"):
        return False
    return isinstance(kind, list) or kind in _WIDGET_TYPES or options.get("socketless") is True


def _few(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
