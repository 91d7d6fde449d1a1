"""What mkdocs does not do by itself: see each function. Named in mkdocs.yml; not part of the site."""

from __future__ import annotations

import argparse
import inspect
import logging
import os
import re
from pathlib import Path
from typing import Any

import griffe

ROOT = Path(__file__).resolve().parent.parent

_log = logging.getLogger("mkdocs.hooks")  # its warnings fail a strict build

_OUTSIDE = re.compile(r"(?<!!)\[([^\]]+)\]\(((?:\.\./)+[^)\s#]+)\)")


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """The command line's page from `--help`; links out of docs/, which a forge can follow and the site cannot."""
    if page.file.src_uri == "reference/cli.md":
        return markdown + _command_line()

    def name_it(found: re.Match[str]) -> str:
        text, link = found.groups()
        target = (Path(page.file.abs_src_path).parent / link).resolve()
        if target.is_relative_to(config.docs_dir):
            return found[0]
        if not target.exists():
            _log.warning("%s links to %s, which does not exist", page.file.src_uri, link)
        path = target.relative_to(ROOT).as_posix()
        if config.repo_url:
            return f"[{text}]({config.repo_url.rstrip('/')}/blob/main/{path})"
        if text == path:
            return f"`{path}`"
        return f"{text}: `{path}`" if markdown[: found.start()].endswith("(") else f"{text} (`{path}`)"

    return _OUTSIDE.sub(name_it, markdown)


def _command_line() -> str:
    """A section for each command, from its own --help."""
    os.environ.update(COLUMNS="86", NO_COLOR="1")
    from anima_fast.cli import _parser

    sections: list[str] = []

    def add(parser: argparse.ArgumentParser) -> None:
        commands = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
        level = "##" if parser.prog.count(" ") < 2 else "###"
        sections.append(f"{level} {parser.prog}\n\n```text\n{parser.format_help().rstrip()}\n```\n")
        for action in commands:
            for command in action.choices.values():
                add(command)

    add(_parser())
    return "\n" + "\n".join(sections)


class Docstrings(griffe.Extension):
    """Docstrings as they are written here: "Example:", and "k, v: ..." where one line documents several parameters."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Says "Examples:", the one word that griffe reads as code; warns of "Args:" that a function does not take."""
        if obj.docstring is None:
            return
        text = inspect.cleandoc(obj.docstring.value)
        obj.docstring.value = re.sub(r"^Example:$", "Examples:", text, flags=re.M)
        if not isinstance(obj, griffe.Function):
            return
        taken = {parameter.name.lstrip("*") for parameter in obj.parameters}
        listed = re.search(r"^Args:\n((?:    .*\n?|\n)+)", text, re.M)
        for line in re.findall(r"^    (\w+(?:, \w+)*):", listed[1] if listed else "", re.M):
            for name in line.split(", "):
                if name not in taken:
                    _log.warning("%s documents %r, which it does not take", obj.path, name)
