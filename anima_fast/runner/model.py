"""Anima in diffusers' form: finding it on disk or on the hub, and loading it.

`find` gives a directory with `modular_model_index.json` (or `model_index.json`), `load` a pipeline whose denoising loop
calls back after each step. What can go wrong is said in one line: no such model, ComfyUI's single file, no network,
a part that cannot be read, a package that is missing.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import invalid

__all__ = ["DEFAULT_MODEL", "HUB_NAME", "StepCallback", "find", "load", "quiet"]

DEFAULT_MODEL = "circlestone-labs/Anima-Base-v1.0-Diffusers"

#: Called after each step with (number of steps done, number of steps, the loop's state).
StepCallback = Callable[[int, int, Any], None]

_INDEXES = ("modular_model_index.json", "model_index.json")
_WEIGHTS = (".safetensors", ".sft", ".ckpt", ".pt", ".pth", ".bin", ".gguf")
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def find(model: str) -> Path:
    """The directory of a model: a local one, or a hub name's, downloaded if it is not there yet.

    Raises ValueError or FileNotFoundError that says what to do.
    """
    _check_packages()
    path = Path(model).expanduser()
    if path.suffix.lower() in _WEIGHTS or model.strip("/") == "circlestone-labs/Anima":
        raise invalid(
            "--model",
            f"{model!r}, weights in single files as ComfyUI takes them",
            f"the diffusers form of it, a directory or a hub name: {DEFAULT_MODEL} (regions in ComfyUI itself: "
            "anima_fast's nodes)",
        )
    if path.is_file():
        raise invalid("--model", f"{model!r}, which is a file", f"a directory or a hub name, such as {DEFAULT_MODEL}")
    if path.is_dir():
        return _check_directory(path)
    if not HUB_NAME.fullmatch(model):
        raise FileNotFoundError(f"--model: no directory {model!r}, and it is no hub name such as {DEFAULT_MODEL}")
    return _check_directory(_from_hub(model))


def load(
    directory: Path,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    after_step: StepCallback | None = None,
    components: Mapping[str, Any] | None = None,
) -> Any:
    """The pipeline with all its components in `dtype` on `device`; `components` are taken in place of its own, which
    are not loaded.

    Raises ValueError that names the component which cannot be loaded.
    """
    diffusers = importlib.import_module("diffusers")
    config = directory / "transformer" / "config.json"
    if config.is_file() and json.loads(config.read_text()).get("concat_padding_mask", True):
        _check_torchvision()
    with quiet():
        blocks = diffusers.AnimaAutoBlocks()
        for loop in _denoising_loops(blocks):
            loop.set_progress_bar_config(disable=True)
            if after_step is not None:
                loop.sub_blocks["after_step"] = _step_block(after_step)
        pipe = blocks.init_pipeline(str(directory))
        pipe.update_components(**(components or {}))
        for name in pipe.component_names:
            _check_folder(pipe.get_component_spec(name), name)
        pipe.load_components(dtype=dtype)
        for name in pipe.component_names:
            if getattr(pipe, name, None) is None:
                raise _why_not(pipe, name, directory)
        pipe.to(device)
    return pipe


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the notices and progress bars of diffusers and transformers that are not about the user's picture."""
    libraries = [importlib.import_module(f"{name}.utils.logging") for name in ("diffusers", "transformers")]
    before = [(library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries]
    for library in libraries:
        library.set_verbosity_error()
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, (verbosity, bar) in zip(libraries, before, strict=True):
            library.set_verbosity(verbosity)
            if bar:
                library.enable_progress_bar()


def _check_packages() -> None:
    # diffusers loads a transformer whose parts stay fp32, such as Anima's, with accelerate only
    missing = [name for name in ("diffusers", "transformers", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"{' and '.join(missing)} not installed: pip install 'anima-fast[diffusers]'")
    if not hasattr(importlib.import_module("diffusers"), "AnimaModularPipeline"):
        version = importlib.import_module("diffusers").__version__
        raise ValueError(f"diffusers {version} has no AnimaModularPipeline: pip install -U diffusers (0.42 or newer)")


def _check_torchvision() -> None:
    problem = "is not installed"
    if importlib.util.find_spec("torchvision") is not None:
        try:
            importlib.import_module("torchvision.transforms")
            return
        except (ImportError, RuntimeError, AttributeError) as error:  # built for another torch
            problem = f"does not fit torch {torch.__version__} ({error})"
    raise ValueError(
        f"torchvision {problem}; diffusers needs it for Anima's padding mask. Install the one that belongs to this "
        f"torch (https://pytorch.org/get-started)"
    )


def _check_directory(path: Path) -> Path:
    index = next((path / name for name in _INDEXES if (path / name).is_file()), None)
    if index is None:
        files = [file.name for file in path.iterdir() if file.suffix.lower() in _WEIGHTS]
        what = f"{str(path)!r}, which has no {_INDEXES[0]}"
        if files:
            what += f" but single files as ComfyUI takes them ({files[0]})"
        raise invalid("--model", what, f"a model in diffusers' form, such as {DEFAULT_MODEL}")
    try:
        name = json.loads(index.read_text(encoding="utf-8")).get("_class_name")
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
        raise invalid("--model", f"{str(index)!r}, which cannot be read ({error})", "a whole download") from error
    if not str(name).startswith("Anima"):
        raise invalid("--model", f"{str(path)!r}, a {name}", f"an Anima model, such as {DEFAULT_MODEL}")
    return path


def _from_hub(name: str) -> Path:
    hub = importlib.import_module("huggingface_hub")
    errors = importlib.import_module("huggingface_hub.errors")
    try:
        hub.HfApi().model_info(name, timeout=20)  # one request: a download would try for minutes without a network
        return Path(hub.snapshot_download(name))
    except errors.GatedRepoError as error:
        raise ValueError(f"--model: {name} asks you to accept its terms: log in with `hf auth login`") from error
    except errors.RepositoryNotFoundError as error:
        raise FileNotFoundError(f"--model: no directory {name!r}, and the hub has no model of that name") from error
    except Exception as error:  # what a network can do wrong has no common class
        reason = (str(error).splitlines() or [type(error).__name__])[0]
    try:
        return Path(hub.snapshot_download(name, local_files_only=True))
    except errors.LocalEntryNotFoundError as error:
        raise FileNotFoundError(
            f"--model: {name} was never downloaded to this machine, and the hub cannot be reached ({reason}). With a "
            f"network: hf download {name}; or give --model a directory"
        ) from error


def _check_folder(spec: Any, name: str) -> None:
    """Without its files, transformers makes a tokenizer of a few letters, and says nothing."""
    source = spec.pretrained_model_name_or_path
    if source is not None and Path(source).is_dir() and not (Path(source) / (spec.subfolder or "")).is_dir():
        raise invalid(
            "--model", f"{str(source)!r}, whose {name} cannot be loaded (it is not there)", "a whole download"
        )


def _why_not(pipe: Any, name: str, directory: Path) -> ValueError:
    """Why a component is missing: diffusers only logs it."""
    reason = "the index does not name it"
    spec = pipe.get_component_spec(name)
    if spec.pretrained_model_name_or_path is not None:
        try:
            spec.load()
        except Exception as error:  # whatever its class raises
            reason = (str(error).splitlines() or [type(error).__name__])[0]
    return invalid("--model", f"{str(directory)!r}, whose {name} cannot be loaded ({reason})", "a whole download")


def _denoising_loops(blocks: Any) -> list[Any]:
    return [route.sub_blocks["denoise"] for route in blocks.sub_blocks["denoise"].sub_blocks.values()]


def _step_block(callback: StepCallback) -> Any:
    """A last block of the denoising loop that calls back; it is diffusers' way to look into one."""
    base = importlib.import_module("diffusers").ModularPipelineBlocks

    class AfterStep(base):  # type: ignore[misc, valid-type]
        model_name = "anima"

        @property
        def description(self) -> str:
            return "Reports a finished step."

        def __call__(self, components: Any, block_state: Any, i: int, t: torch.Tensor) -> tuple[Any, Any]:
            callback(i + 1, len(block_state.timesteps), block_state)
            return components, block_state

    return AfterStep()
