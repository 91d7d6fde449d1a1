"""`--fix`: the edits of findings, made in the workflow's own text. All that is not edited stays, byte for byte."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .findings import Edit, Finding
from .workflow import BYPASSED, Link, Node, Workflow

__all__ = ["Fixed", "fix", "patch_text"]

_decode = json.JSONDecoder().raw_decode
_ROUNDS = 4  # one mended fault can show another


@dataclass(frozen=True)
class Fixed:
    """The corrected file, what was done, and what is left to find in it."""

    text: str
    done: tuple[tuple[Finding, Edit], ...]
    left: tuple[Finding, ...]


def fix(text: str, read: Callable[[str], Workflow], check: Callable[[Workflow], list[Finding]]) -> Fixed:
    """Make the edits of errors and warnings in a workflow's JSON until none is left to make.

    `read` makes a workflow of text, `check` its findings. Notes are left as they are.
    """
    done: list[tuple[Finding, Edit]] = []
    workflow = read(text)
    left = check(workflow)
    for _ in range(_ROUNDS):
        made = []
        touched: set[tuple[str, str]] = set()
        for finding in left:
            for edit in finding.edits if finding.severity != "note" else ():
                if (edit.node, edit.input) not in touched and apply(workflow, edit):
                    touched.add((edit.node, edit.input))
                    made.append((finding, edit))
        if not made:
            break
        done += made
        text = patch_text(text, workflow.document)
        workflow = read(text)
        left = check(workflow)
    return Fixed(text, tuple(done), tuple(left))


def apply(workflow: Workflow, edit: Edit) -> bool:
    """Make one edit in `workflow.document`; False if this form of workflow cannot say it in place."""
    node = workflow.nodes.get(edit.node)
    if node is None:
        return False
    if edit.input == "":
        return _bypass(workflow, node) if edit.value is None else _retype(workflow, node, str(edit.value))
    if isinstance(edit.value, Link):
        return _connect(workflow, node, edit.input, edit.value)
    place = node.places.get(edit.input)
    if place is not None:
        place[0][place[1]] = edit.value
        return True
    if workflow.kind == "api":
        node.raw.setdefault("inputs", {})[edit.input] = edit.value
        return True
    return False


def _retype(workflow: Workflow, node: Node, kind: str) -> bool:
    if workflow.kind == "api":
        node.raw["class_type"] = kind
        return True
    properties = node.raw.get("properties")
    if isinstance(properties, dict) and properties.get("Node name for S&R") == node.class_type:
        properties["Node name for S&R"] = kind
    node.raw["type"] = kind
    return True


def _bypass(workflow: Workflow, node: Node) -> bool:
    """Take a model patch out: bypassed in the user interface's form; in API form its readers get what it gets."""
    if workflow.kind == "ui":
        node.raw["mode"] = BYPASSED
        return True
    model = node.inputs.get("model")
    if not isinstance(model, Link):
        return False
    for reader in workflow.nodes.values():
        for name, link in reader.links():
            if link.node == node.id:
                reader.raw["inputs"][name] = [model.node, model.slot]
    return True


def _connect(workflow: Workflow, node: Node, name: str, to: Link) -> bool:
    if workflow.kind == "api":
        node.raw["inputs"][name] = [to.node, to.slot]
        return True
    graph = _graph_of(workflow, node.raw)
    prefix, _, key = to.node.rpartition(":")
    if graph is None or prefix != node.id.rpartition(":")[0]:
        return False  # between subgraphs a link would need new slots
    origin = next((n for n in graph["nodes"] if str(n["id"]) == key), None)
    entries = node.raw.get("inputs") or []
    slot = next((index for index, entry in enumerate(entries) if entry.get("name") == name), None)
    if origin is None or slot is None or entries[slot].get("link") is None:
        return False
    number = entries[slot]["link"]
    for link in graph.get("links") or []:
        if isinstance(link, dict) and link.get("id") == number:
            link["origin_id"], link["origin_slot"] = origin["id"], to.slot
        elif isinstance(link, list) and link[0] == number:
            link[1], link[2] = origin["id"], to.slot
    for other in graph["nodes"]:
        for index, output in enumerate(other.get("outputs") or []):
            links = output.get("links")
            wanted = other is origin and index == to.slot
            if isinstance(links, list) and number in links and not wanted:
                links.remove(number)
            elif wanted and number not in (links or []):
                output["links"] = [*(links or []), number]
    return True


def _graph_of(workflow: Workflow, raw: dict[str, Any]) -> dict[str, Any] | None:
    graphs = [workflow.raw, *((workflow.raw.get("definitions") or {}).get("subgraphs") or [])]
    return next((graph for graph in graphs if any(node is raw for node in graph["nodes"])), None)


def patch_text(text: str, new: Any) -> str:
    """`text`, which is JSON, changed so that it says `new`: values that are the same keep their spelling.

    >>> patch_text('{"a": 1.50, "b": [1,2]}', {"a": 1.5, "b": [1, 3]})
    '{"a": 1.50, "b": [1,3]}'
    """
    start = len(text) - len(text.lstrip("\ufeff \t\r\n"))
    span, _ = _scan(text, start)
    return text[: span.start] + _render(text, span, new) + text[span.end :]


@dataclass
class _Span:
    """A JSON value in a text: where it stands, and its members' keys and spans if it has any."""

    start: int
    end: int
    keys: list[str] | None = None
    key_starts: list[int] | None = None
    items: list[_Span] | None = None


def _skip(text: str, at: int) -> int:
    while text[at] in " \t\r\n":
        at += 1
    return at


def _scan(text: str, at: int) -> tuple[_Span, int]:
    start = at
    if text[at] not in "{[":
        at = _decode(text, at)[1]
        return _Span(start, at), at
    is_object = text[at] == "{"
    keys: list[str] = []
    key_starts: list[int] = []
    items: list[_Span] = []
    at = _skip(text, at + 1)
    while text[at] not in "]}":
        if is_object:
            key_starts.append(at)
            key, at = _decode(text, at)
            keys.append(key)
            at = _skip(text, _skip(text, at) + 1)  # the colon
        item, at = _scan(text, at)
        items.append(item)
        at = _skip(text, at)
        if text[at] == ",":
            at = _skip(text, at + 1)
    return _Span(start, at + 1, keys if is_object else None, key_starts if is_object else None, items), at + 1


def _render(text: str, span: _Span, new: Any) -> str:
    old = text[span.start : span.end]
    if span.items is None or not span.items:
        return old if _same(json.loads(old), new) else _dump(new)
    if span.keys is not None:
        if not isinstance(new, dict) or list(new)[: len(span.keys)] != span.keys:
            return old if _same(json.loads(old), new) else _dump(new)
        return _members(text, span, [new[key] for key in span.keys], list(new.items())[len(span.keys) :])
    if not isinstance(new, list) or len(new) < len(span.items):
        return _dump(new)
    return _members(text, span, new[: len(span.items)], new[len(span.items) :])


def _members(text: str, span: _Span, values: Sequence[Any], added: Sequence[Any]) -> str:
    """A container's own text with its members rendered, and new ones put behind the last as the others stand."""
    items = span.items or []
    out, at = [], span.start
    for item, value in zip(items, values, strict=True):
        out += [text[at : item.start], _render(text, item, value)]
        at = item.end
    if added:
        starts = span.key_starts or [item.start for item in items]
        if len(items) > 1:
            between = text[items[-2].end : starts[-1]]
        else:
            between = "," + (text[span.start + 1 : starts[0]] or " ")
        for entry in added:
            said = f"{json.dumps(entry[0])}: {_dump(entry[1])}" if span.keys is not None else _dump(entry)
            out.append(between + said)
    return "".join([*out, text[at : span.end]])


def _same(old: Any, new: Any) -> bool:
    return type(old) is type(new) and (old == new or (old != old and new != new))


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
