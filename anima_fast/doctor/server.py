"""A ComfyUI server, asked over HTTP and its websocket: what it is, and what a queued prompt makes.

    with Server("http://127.0.0.1:8188") as server:
        number = server.queue(prompt)
        result = server.follow(number, on_progress=print)
        pictures = [server.fetch(file) for file in result.files()]

Only the address given is contacted: no proxy, no redirect. All that is done to it: prompts are queued, and on the way
out of the `with` those still waiting or running are taken back (never those of others). Every problem is a
`ServerError` with one line that says what to do.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.util
import json
import re
import time
import urllib.parse
import uuid
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from ..errors import invalid

__all__ = ["File", "Progress", "Prompt", "Refused", "Result", "Server", "ServerError"]

#: A workflow in API form: node id -> {"class_type": …, "inputs": {name: value | [node id, output]}}.
Prompt = dict[str, dict[str, Any]]

#: Nothing that a server is asked for is larger: /object_info with hundreds of packs is some 20 MB, a picture less.
_LARGEST_ANSWER = 512 * 2**20

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_LEVEL = re.compile(r"^\[(DEBUG|INFO|WARNING|ERROR|CRITICAL)\] ")

#: Between looks at the history while nothing comes over the websocket, in seconds.
_LOOK = 2.0


class ServerError(OSError):
    """The server cannot be reached, or did not do what it was asked for."""


class Refused(ServerError):
    """The server did not accept a prompt; `nodes` has its reasons by node id."""

    def __init__(self, message: str, nodes: dict[str, list[str]]) -> None:
        super().__init__(message)
        self.nodes = nodes


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far a prompt is: `done` of `total` steps in `node`, or waiting behind `ahead` others."""

    node: str | None = None
    done: int = 0
    total: int = 0
    ahead: int = 0


@dataclasses.dataclass(frozen=True)
class File:
    """One output file of a node, as the server names it."""

    node: str
    kind: str  # "images", "latents", …
    filename: str
    subfolder: str = ""
    type: str = "output"


@dataclasses.dataclass(frozen=True)
class Result:
    """A finished prompt: `status` is "success", "error" or "interrupted"; `outputs` by node id, as in the history."""

    prompt_id: str
    status: str
    outputs: dict[str, Any]
    seconds: float
    error: str | None = None
    error_node: str | None = None

    def files(self, node: str | None = None) -> list[File]:
        """What nodes saved, of one node or of all."""
        found = []
        for name, output in self.outputs.items():
            for kind, entries in (output or {}).items() if isinstance(output, dict) else ():
                for entry in entries if isinstance(entries, list) and node in (None, name) else ():
                    if isinstance(entry, dict) and isinstance(entry.get("filename"), str):
                        place = (str(entry.get("subfolder") or ""), str(entry.get("type") or "output"))
                        found.append(File(name, kind, entry["filename"], *place))
        return found


class Server:
    """A connection to one ComfyUI server.

    Args:
        address: `http://host:port`, also `host:port`; a path is kept, for a server behind one.
        timeout: seconds that one answer may take, from connecting to its last byte.
        patience: seconds that a queued prompt may take, waiting included.

    Raises ValueError for an address that is none, and ServerError if the packages of the `doctor` extra are missing.
    """

    def __init__(self, address: str, *, timeout: float = 30.0, patience: float = 3600.0) -> None:
        missing = [n for n in ("httpx2", "websocket") if importlib.util.find_spec(n) is None]
        if missing:
            raise ServerError("packages to talk to a server are not installed: pip install 'anima-fast[doctor]'")
        self._http = importlib.import_module("httpx2")
        self._websocket = importlib.import_module("websocket")
        self.address = _address(address)
        self.timeout, self.patience = timeout, patience
        self.client_id = uuid.uuid4().hex
        self._pending: list[str] = []
        self._socket: Any = None
        self._client = self._http.Client(timeout=timeout, trust_env=False, follow_redirects=False)

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # A dead server keeps nothing of ours; what brought us here is the error to show.
        with contextlib.suppress(ServerError):
            self.withdraw()
        self._close_socket()
        self._client.close()

    # ---- questions

    def system_stats(self) -> dict[str, Any]:
        """Versions and devices. Raises ServerError if what answers is no ComfyUI."""
        stats = self._json("GET", "/system_stats")
        if not isinstance(stats, dict) or not isinstance(stats.get("system"), dict):
            raise ServerError(f"{self.address} answers, but not as ComfyUI does (no /system_stats)")
        return stats

    def object_info(self) -> dict[str, Any]:
        """Every node class that the server has, with its inputs and outputs."""
        info = self._json("GET", "/object_info")
        if not isinstance(info, dict) or not info:
            raise ServerError(f"{self.address} answers, but not as ComfyUI does (no /object_info)")
        return info

    def extensions(self) -> list[str]:
        """The addresses of the scripts that packs add to the user interface."""
        found = self._json("GET", "/extensions")
        return [str(entry) for entry in found] if isinstance(found, list) else []

    def log(self, since: str = "") -> tuple[list[str], str]:
        """The last lines that the server logged after the time `since`, and the time of the last.

        None where the server does not tell; it keeps a few hundred lines.
        """
        status, body = self._request("GET", "/internal/logs/raw")
        try:
            entries = json.loads(body)["entries"] if status == 200 else []
            new = [(str(entry["t"]), str(entry["m"])) for entry in entries]
        except (ValueError, KeyError, TypeError):
            return [], since
        text = "".join(message for moment, message in new if moment > since)
        lines = [_LEVEL.sub("", _COLOUR.sub("", line)) for line in text.splitlines()]
        return lines, max((moment for moment, _ in new), default=since)

    def regional_log(self) -> list[str]:
        """The last lines of the file in which anima-regional-comfy-nodes logs shapes: on this machine only."""
        if not self.is_local:
            return []
        status, body = self._request("GET", "/internal/folder_paths")
        try:
            folders = json.loads(body)["custom_nodes"] if status == 200 else []
            files = [file for folder in folders for file in Path(folder).glob("*/anima_regional_debug.log")]
            return [line for file in files for line in file.read_text(errors="replace").splitlines()[-400:]]
        except (ValueError, KeyError, TypeError, OSError):
            return []

    @property
    def is_local(self) -> bool:
        host = urllib.parse.urlsplit(self.address).hostname or ""
        return host in ("localhost", "::1") or host.startswith("127.")

    def fetch(self, file: File) -> bytes:
        """The bytes of an output file."""
        query = urllib.parse.urlencode({"filename": file.filename, "subfolder": file.subfolder, "type": file.type})
        status, body = self._request("GET", f"/view?{query}")
        if status != 200:
            raise ServerError(f"{self.address} does not give {file.filename} back (HTTP {status})")
        return body

    def environment(self) -> dict[str, Any]:
        """`system_stats`, `object_info`, `extensions`, `log`, and the `facts` and `unknown` made of them."""
        from .environment import facts

        found: dict[str, Any] = {
            "address": self.address,
            "is_local": self.is_local,
            "system_stats": self.system_stats(),
            "object_info": self.object_info(),
            "extensions": self.extensions(),
            "log": self.log()[0],
        }
        return {**found, **facts(found)}

    # ---- the queue

    def queue(self, prompt: Prompt) -> str:
        """Queue a prompt; its id. Raises Refused with the reasons of each node."""
        self._open_socket()  # before queueing, so that no message is missed
        number = str(uuid.uuid4())
        self._pending.append(number)  # before it is sent: an interrupt in between must find it
        body = {"prompt": prompt, "client_id": self.client_id, "prompt_id": number}
        status, text = self._request("POST", "/prompt", body)
        try:
            answer = json.loads(text)
        except ValueError:
            answer = None
        if status == 200 and isinstance(answer, dict) and isinstance(answer.get("prompt_id"), str):
            if answer["prompt_id"] != number:  # an older server names it itself
                self._pending.remove(number)
                number = answer["prompt_id"]
                self._pending.append(number)
            return number
        self._pending.remove(number)
        if status == 400 and isinstance(answer, dict):
            raise _refused(answer, prompt)
        raise ServerError(f"{self.address} does not take prompts (HTTP {status})")

    def follow(self, prompt_id: str, on_progress: Callable[[Progress], None] | None = None) -> Result:
        """Wait for a prompt of `queue` to end, reporting its progress.

        Raises ServerError when the server goes away or stops answering, when the prompt vanishes from its queue, and
        after `patience` seconds.
        """
        started, looked, last = time.monotonic(), 0.0, Progress()
        tell = on_progress or (lambda _: None)
        while True:
            now = time.monotonic()
            if now - started > self.patience:
                raise ServerError(
                    f"{self.address}: the prompt did not end within {self.patience:g} s (last at node {last.node})"
                )
            message = self._receive()
            told = message is not None and message["data"].get("prompt_id") in (prompt_id, None)
            if message is not None and told:
                step = _progress(message, last)
                if step is not None:
                    last = step
                    tell(step)
            ended = message is not None and told and _ended(message)
            if not ended and now - looked < _LOOK:
                continue
            looked = now
            entry = self._history(prompt_id)
            if entry is not None:
                self._pending = [number for number in self._pending if number != prompt_id]
                return _result(prompt_id, entry, time.monotonic() - started)
            running, waiting = self._queued()
            if prompt_id in waiting:
                tell(Progress(ahead=waiting.index(prompt_id) + len(running)))
            elif prompt_id not in running:
                # It may have ended between the two questions.
                entry = self._history(prompt_id)
                if entry is None:
                    self._pending = [number for number in self._pending if number != prompt_id]
                    raise ServerError(
                        f"{self.address}: the prompt is in neither its queue nor its history; it was deleted there, or "
                        "the server was started anew"
                    )

    def withdraw(self) -> None:
        """Take back what was queued here and has not ended: waiting prompts are deleted, a running one interrupted."""
        pending, self._pending = self._pending, []
        if not pending:
            return
        self._request("POST", "/queue", {"delete": pending})
        running, _ = self._queued()
        for number in pending:
            if number in running:  # never without an id, which would stop whatever runs
                self._request("POST", "/interrupt", {"prompt_id": number})

    # ---- the wire

    def _history(self, prompt_id: str) -> dict[str, Any] | None:
        found = self._json("GET", f"/history/{prompt_id}")
        entry = found.get(prompt_id) if isinstance(found, dict) else None
        return entry if isinstance(entry, dict) else None

    def _queued(self) -> tuple[list[str], list[str]]:
        """The ids of running and of waiting prompts, these in the order they will run."""
        found = self._json("GET", "/queue")
        try:
            waiting = sorted(found["queue_pending"], key=lambda item: item[0])
            return [str(item[1]) for item in found["queue_running"]], [str(item[1]) for item in waiting]
        except (KeyError, TypeError, IndexError) as error:
            raise ServerError(f"{self.address} answers, but not as ComfyUI does (no /queue)") from error

    def _json(self, method: str, path: str) -> Any:
        status, body = self._request(method, path)
        if status != 200:
            raise ServerError(f"{self.address}{path}: HTTP {status}; is this ComfyUI?")
        try:
            return json.loads(body)
        except (ValueError, RecursionError) as error:
            raise ServerError(f"{self.address}{path} does not answer with JSON; is this ComfyUI?") from error

    def _request(self, method: str, path: str, body: Any = None) -> tuple[int, bytes]:
        """Status and body. A server that sends a byte now and then is too slow as well: the deadline is for all."""
        http, deadline = self._http, time.monotonic() + self.timeout
        try:
            with self._client.stream(method, self.address + path, json=body) as answer:
                chunks, size = [], 0
                for chunk in answer.iter_bytes():
                    chunks.append(chunk)
                    size += len(chunk)
                    if time.monotonic() > deadline:
                        raise ServerError(f"{self.address} is too slow: {path} took over {self.timeout:g} s")
                    if size > _LARGEST_ANSWER:
                        raise ServerError(f"{self.address}{path} answers with more than {_LARGEST_ANSWER} bytes")
                status = int(answer.status_code)
        except http.ConnectTimeout as error:
            raise ServerError(f"no server answers at {self.address} (no connection in {self.timeout:g} s)") from error
        except http.ConnectError as error:
            raise ServerError(f"no server at {self.address} ({error}); is ComfyUI running there?") from error
        except http.TimeoutException as error:
            raise ServerError(f"{self.address} does not answer: {path} took over {self.timeout:g} s") from error
        except http.InvalidURL as error:
            raise invalid("--comfyui", repr(self.address), "an address such as http://127.0.0.1:8188") from error
        except http.HTTPError as error:
            raise ServerError(
                f"{self.address} broke off while asked for {path} ({error or type(error).__name__})"
            ) from error
        if 300 <= status < 400:
            raise ServerError(f"{self.address} sends us to another address, which is not followed; give that one")
        if status in (401, 403):
            raise ServerError(f"{self.address} asks for a login (HTTP {status}), or does not allow this client")
        return status, b"".join(chunks)

    def _open_socket(self) -> None:
        if self._socket is not None:
            return
        address = self.address.replace("http", "ws", 1) + f"/ws?clientId={self.client_id}"
        # It asks the environment for a proxy unless it is given one; "*" says that it is for no host.
        direct = {"http_proxy_host": "none", "http_proxy_port": 1, "http_no_proxy": ["*"]}
        try:
            self._socket = self._websocket.create_connection(address, timeout=self.timeout, **direct)
            self._socket.settimeout(_LOOK / 2)
        except (self._websocket.WebSocketException, OSError) as error:
            raise ServerError(f"{self.address} opens no websocket ({error}); is ComfyUI running there?") from error

    def _close_socket(self) -> None:
        if self._socket is not None:
            with contextlib.suppress(self._websocket.WebSocketException, OSError):
                self._socket.close(timeout=1)
            self._socket = None

    def _receive(self) -> dict[str, Any] | None:
        """The next message; None if none came for a moment, and for previews, which are binary.

        Without the websocket the history still tells the end, so a lost one is only opened anew.
        """
        try:
            self._open_socket()
            text = self._socket.recv()
        except self._websocket.WebSocketTimeoutException:
            return None
        except (self._websocket.WebSocketException, OSError) as error:
            if isinstance(error, ServerError):
                self.system_stats()  # says what is wrong, if HTTP does not answer either
            self._close_socket()
            time.sleep(0.2)
            return None
        if not isinstance(text, str):
            return None
        try:
            message = json.loads(text)
        except ValueError:
            return None
        data = message.get("data") if isinstance(message, dict) else None
        return message if isinstance(data, dict) and isinstance(message.get("type"), str) else None


def _address(text: str) -> str:
    """`http://host:port` without a slash at the end."""
    whole = text.strip() if "://" in text else f"http://{text.strip()}"
    problem = invalid("--comfyui", repr(text), "an address such as http://127.0.0.1:8188")
    try:
        parts = urllib.parse.urlsplit(whole)
        port = parts.port
    except ValueError as error:
        raise problem from error
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment or port == 0:
        raise problem
    if any(letter.isspace() for letter in whole):
        raise problem
    return whole.rstrip("/")


def _progress(message: dict[str, Any], last: Progress) -> Progress | None:
    data = message["data"]
    if message["type"] == "executing" and data.get("node") is not None:
        return Progress(node=str(data.get("display_node") or data["node"]))
    if message["type"] == "progress":
        try:
            return Progress(str(data.get("node") or last.node), int(data["value"]), int(data["max"]))
        except (KeyError, TypeError, ValueError):
            return None
    return None


def _ended(message: dict[str, Any]) -> bool:
    kinds = ("execution_success", "execution_error", "execution_interrupted")
    return message["type"] in kinds or (message["type"] == "executing" and message["data"].get("node") is None)


def _result(prompt_id: str, entry: dict[str, Any], seconds: float) -> Result:
    status = entry.get("status") or {}
    messages = status.get("messages") or []
    outputs = entry.get("outputs")
    outputs = outputs if isinstance(outputs, dict) else {}
    for kind, data in (item for item in messages if isinstance(item, (list, tuple)) and len(item) == 2):
        if kind == "execution_error":
            reason = " ".join(str(data.get("exception_message", "")).split()) or "no reason given"
            node = str(data.get("node_id"))
            text = f"node {node} ({data.get('node_type')}): {data.get('exception_type')}: {reason}"
            return Result(prompt_id, "error", outputs, seconds, text, node)
        if kind == "execution_interrupted":
            text = f"interrupted at node {data.get('node_id')}, by somebody else"
            return Result(prompt_id, "interrupted", outputs, seconds, text)
    if status.get("status_str", "success") != "success":
        return Result(prompt_id, "error", outputs, seconds, "the server says no reason")
    return Result(prompt_id, "success", outputs, seconds)


def _refused(answer: dict[str, Any], prompt: Prompt) -> Refused:
    nodes: dict[str, list[str]] = {}
    errors = answer.get("node_errors")
    for number, found in (errors if isinstance(errors, dict) else {}).items():
        lines = []
        for one in found.get("errors") or []:
            name = (one.get("extra_info") or {}).get("input_name")
            detail = str(one.get("details") or "")
            lines.append(f"{name}: {one.get('message')}" + (f" ({detail})" if detail not in ("", name) else ""))
        nodes[str(number)] = lines
    error = answer.get("error")
    reason = error.get("message") if isinstance(error, dict) else error
    if not nodes and isinstance(error, dict) and error.get("details"):
        reason = f"{reason} ({error['details']})"
    told = "; ".join(
        f"node {number} ({prompt.get(number, {}).get('class_type', '?')}): {', '.join(lines) or 'no reason given'}"
        for number, lines in nodes.items()
    )
    return Refused(f"the server refuses the workflow: {told or reason}", nodes)
