"""Reading an encoder checkpoint: which tensors a file must hold, and nothing else; mapped into memory, never pickled.

Three layouts, each under no prefix, `model.` or `model.language_model.`:

companion   embed_tokens, layers.{i}.*, and the head `norm.{0,1,3}.*`; the last layer may come without its MLP
            (Qwen3.5-4B for Anima: 426 tensors)
base        embed_tokens, layers.{i}.*, and one final `norm.weight`; no head, so the output is as wide as the model
transformers'   the base layout beside `lm_head`, `mtp.*` and the vision tower, which are not the text encoder's; one
            file, or a directory with shards and their index

Weights keep the type they have in the file (FP8 E4M3, BF16, FP16 or FP32): a mapped file costs no memory of its own,
and a matrix is widened when it is used. The sizes of the model follow from the shapes; what shapes leave open
(`EncoderConfig.open_fields`) comes from the `config` argument, the file's metadata or a config.json beside it, else it
is Qwen3.5's.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import struct
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import invalid, wrong_type

__all__ = ["Checkpoint", "EncoderConfig", "read_checkpoint"]

PREFIXES = ("model.language_model.", "model.", "")
# Parts of a whole Qwen3.5 that are not the text encoder.
OTHER_PARTS = re.compile(r"^(lm_head\.|mtp\.|model\.mtp\.|model\.visual\.|visual\.|model\.lm_head\.)")
_OF_SCALED_FP8 = ("scale_weight", "weight_scale", "scale_input", "input_scale", "comfy_quant", "scaled_fp8")
_MOST_LAYERS = 1024
_MOST_NAMED = 60
_BLOCK = 1 << 18

# safetensors' name of a type -> torch's, and the bits that are all set in a number that is not finite
_TYPES: dict[str, tuple[torch.dtype, torch.dtype, int]] = {
    "F8_E4M3": (torch.float8_e4m3fn, torch.uint8, 0x7F),
    "BF16": (torch.bfloat16, torch.int16, 0x7F80),
    "F16": (torch.float16, torch.int16, 0x7C00),
    "F32": (torch.float32, torch.int32, 0x7F800000),
}


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """The sizes of a Qwen3.5 text model with a head. The defaults are Qwen3.5-4B for Anima."""

    vocab_size: int = 248320
    hidden_size: int = 2560
    intermediate_size: int = 9216
    layer_types: tuple[str, ...] = (("linear_attention",) * 3 + ("full_attention",)) * 8
    last_mlp: bool = False
    num_attention_heads: int = 16
    num_key_value_heads: int = 4
    head_dim: int = 256
    linear_num_key_heads: int = 16
    linear_num_value_heads: int = 32
    linear_key_head_dim: int = 128
    linear_value_head_dim: int = 128
    linear_conv_kernel_dim: int = 4
    head_size: int | None = 1024
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e7
    partial_rotary_factor: float = 0.25

    #: What no tensor's shape decides. (Of the key heads, shapes give heads x width; width = the value heads' if open.)
    open_fields = ("linear_num_key_heads", "linear_key_head_dim", "rms_norm_eps", "rope_theta", "partial_rotary_factor")

    @property
    def output_size(self) -> int:
        return self.hidden_size if self.head_size is None else self.head_size

    @property
    def num_hidden_layers(self) -> int:
        return len(self.layer_types)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the model: its name without prefix, and its shape."""
        hidden, mlp = self.hidden_size, self.intermediate_size
        queries, keys = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        heads, values = self.linear_num_value_heads, self.linear_num_value_heads * self.linear_value_head_dim
        mixed = 2 * self.linear_num_key_heads * self.linear_key_head_dim + values
        shapes: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (self.vocab_size, hidden)}
        for i, kind in enumerate(self.layer_types):
            layer: dict[str, tuple[int, ...]] = {"input_layernorm.weight": (hidden,)}
            if kind == "linear_attention":
                layer |= {
                    "linear_attn.in_proj_qkv.weight": (mixed, hidden),
                    "linear_attn.in_proj_z.weight": (values, hidden),
                    "linear_attn.in_proj_a.weight": (heads, hidden),
                    "linear_attn.in_proj_b.weight": (heads, hidden),
                    "linear_attn.conv1d.weight": (mixed, 1, self.linear_conv_kernel_dim),
                    "linear_attn.A_log": (heads,),
                    "linear_attn.dt_bias": (heads,),
                    "linear_attn.norm.weight": (self.linear_value_head_dim,),
                    "linear_attn.out_proj.weight": (hidden, values),
                }
            else:
                layer |= {
                    "self_attn.q_proj.weight": (2 * queries, hidden),
                    "self_attn.k_proj.weight": (keys, hidden),
                    "self_attn.v_proj.weight": (keys, hidden),
                    "self_attn.o_proj.weight": (hidden, queries),
                    "self_attn.q_norm.weight": (self.head_dim,),
                    "self_attn.k_norm.weight": (self.head_dim,),
                }
            if self.last_mlp or i + 1 < len(self.layer_types):
                layer |= {
                    "post_attention_layernorm.weight": (hidden,),
                    "mlp.gate_proj.weight": (mlp, hidden),
                    "mlp.up_proj.weight": (mlp, hidden),
                    "mlp.down_proj.weight": (hidden, mlp),
                }
            shapes |= {f"layers.{i}.{name}": shape for name, shape in layer.items()}
        if self.head_size is None:
            return shapes | {"norm.weight": (hidden,)}
        out = self.head_size
        return shapes | {
            "norm.0.weight": (out, hidden),
            "norm.0.bias": (out,),
            "norm.1.weight": (out,),
            "norm.3.weight": (out, out),
            "norm.3.bias": (out,),
        }


@dataclasses.dataclass
class Checkpoint:
    """A checkpoint that was read: its tensors by their names without prefix, in the file's types."""

    path: Path
    prefix: str
    config: EncoderConfig
    tensors: dict[str, torch.Tensor]
    metadata: dict[str, str]
    #: SHA-256 over the files' headers (8 bytes of length and the JSON, in the order of the file names) and then the
    #: bytes of every tensor of the head (`norm.*`, in the order of their names): tells which encoder an alignment
    #: was fitted for without reading gigabytes.
    hash: str
    other_parts: tuple[str, ...] = ()


def read_checkpoint(
    path: str | os.PathLike[str],
    config: Mapping[str, Any] | None = None,
    device: torch.device | str = "cpu",
    progress: bool | None = None,
) -> Checkpoint:
    """Read an encoder: a .safetensors file, or a directory that holds one, or shards with their index.

    Args:
        path: the file or directory.
        config: values that shapes leave open, under transformers' names; anything else in it must agree with the file.
        device: where the tensors go. On the CPU they stay in the file, mapped.
        progress: show a bar; default: when stderr is a terminal.

    Raises:
        FileNotFoundError, ValueError: naming the file, and each tensor that is missing, unknown, of a wrong shape or
            type, or holds NaN or infinity. Nothing is returned by halves.
    """
    path = Path(path)
    files = _files(path)
    headers = {file: _header(file) for file in files}
    shapes: dict[str, tuple[Path, tuple[int, ...], str]] = {}
    metadata: dict[str, str] = {}
    for file, (_, header) in headers.items():
        metadata |= header.pop("__metadata__", None) or {}
        for name, entry in header.items():
            if name in shapes:
                raise invalid(
                    "path", f"tensor {name!r} in {shapes[name][0].name} and in {file.name}", "each tensor once"
                )
            shapes[name] = (file, tuple(entry["shape"]), entry["dtype"])
    prefix = _prefix(path, shapes)
    own = {name[len(prefix) :]: entry for name, entry in shapes.items() if _belongs(name, prefix)}
    others = tuple(sorted(name for name in shapes if not _belongs(name, prefix)))
    unknown = [name for name in others if not OTHER_PARTS.match(name)]
    found = {name: entry[1] for name, entry in own.items()}
    sizes = _infer(path, found, _given(path, config, metadata))
    _compare(path, prefix, found, sizes.shapes(), unknown)
    wrong = [f"{prefix}{name} ({entry[2]})" for name, entry in own.items() if entry[2] not in _TYPES]
    if wrong:
        raise invalid("path", f"{str(path)!r} with {_listed(wrong)}", f"tensors of type {' | '.join(_TYPES)}")
    tensors = _read(path, prefix, own, torch.device(device), progress)
    digest = hashlib.sha256()
    for raw, _ in headers.values():
        digest.update(raw)
    for name in sorted(name for name in tensors if name.startswith("norm.")):
        digest.update(tensors[name].detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return Checkpoint(path, prefix, sizes, tensors, metadata, digest.hexdigest(), others)


def _files(path: Path) -> list[Path]:
    if path.is_file():
        if path.suffix != ".safetensors":
            raise invalid("path", repr(str(path)), "a .safetensors file (no pickles: they can run code)")
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"path: no file or directory {str(path)!r}")
    index = path / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise invalid("path", f"{str(index)!r}, which cannot be read ({error!r})", "an index of shards") from error
        for name in names:
            if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
                raise invalid("path", f"shard {name!r} in {str(index)!r}", "names of .safetensors files beside it")
            if not (path / name).is_file():
                raise FileNotFoundError(f"path: no shard {str(path / name)!r}, which {index.name} names")
        return [path / name for name in names]
    files = sorted(path.glob("*.safetensors"))
    if len(files) != 1:
        what = f"{len(files)} .safetensors files and no index" if files else "no .safetensors file"
        raise invalid("path", f"directory {str(path)!r} with {what}", "one file, or shards with their index")
    return files


def _header(file: Path) -> tuple[bytes, dict[str, Any]]:
    """The header's bytes and its JSON, after safetensors itself has checked them against the file's length."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt"):
            pass
        with open(file, "rb") as stream:
            length = stream.read(8)
            raw = length + stream.read(struct.unpack("<Q", length)[0])
        return raw, json.loads(raw[8:])
    except (SafetensorError, OSError, ValueError, struct.error) as error:
        allowed = "a whole safetensors file"
        raise invalid("path", f"{str(file)!r}, which cannot be read ({error})", allowed) from error


def _prefix(path: Path, names: Iterable[str]) -> str:
    """The one of PREFIXES under which the file's embedding lies, else its layers."""
    names = list(names)
    for mark in ("embed_tokens.weight", "layers.0.input_layernorm.weight"):
        for prefix in PREFIXES:
            if prefix + mark in names:
                return prefix
    allowed = "tensors such as embed_tokens.weight under no prefix, 'model.' or 'model.language_model.'"
    foreign = sorted(
        {name.partition("embed_tokens.weight")[0] for name in names if name.endswith("embed_tokens.weight")}
    )
    if foreign:
        raise invalid("path", f"{str(path)!r} with tensors under {_listed([repr(p) for p in foreign])}", allowed)
    raise invalid(
        "path", f"{str(path)!r} with {_listed(sorted(names)[:5]) or 'no tensor'}, no Qwen3.5 text model", allowed
    )


def _belongs(name: str, prefix: str) -> bool:
    return name.startswith(prefix) and not OTHER_PARTS.match(name)


def _given(path: Path, config: Mapping[str, Any] | None, metadata: dict[str, str]) -> list[tuple[str, dict[str, Any]]]:
    """Configurations to heed, the first first, each with the name it has in messages."""
    given = []
    if config is not None:
        if not isinstance(config, Mapping):
            raise wrong_type("config", config, "a mapping of transformers' names to values")
        given.append(("config", _flat("config", dict(config))))
    if "config" in metadata:
        given.append(("metadata", _flat("metadata", _json("metadata", metadata["config"]))))
    beside = (path if path.is_dir() else path.parent) / "config.json"
    if beside.is_file():
        values = _json(beside.name, beside.read_text(encoding="utf-8", errors="replace"))
        if values.get("model_type") in ("qwen3_5", "qwen3_5_text"):
            given.append((beside.name, _flat(beside.name, values)))
        else:
            warnings.warn(
                f"{str(beside)!r} is of model type {values.get('model_type')!r}, not qwen3_5: not used", stacklevel=4
            )
    return given


def _json(where: str, text: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except ValueError as error:
        raise invalid(where, f"what is not JSON ({error})", "a JSON object with transformers' names") from error
    if not isinstance(values, dict):
        raise wrong_type(where, values, "a JSON object with transformers' names")
    return values


def _flat(where: str, values: dict[str, Any]) -> dict[str, Any]:
    """transformers' configuration of a text model or of a whole one, as flat names; what is not ours left out."""
    values = values.get("text_config", values)
    if not isinstance(values, dict):
        raise wrong_type(f"{where}: text_config", values, "an object")
    rope = values.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise wrong_type(f"{where}: rope_parameters", rope, "an object")
    if rope.get("rope_type", "default") != "default":
        raise invalid(f"{where}: rope_type", repr(rope["rope_type"]), "'default'")
    values = {**{name: rope[name] for name in ("rope_theta", "partial_rotary_factor") if name in rope}, **values}
    for name, only in (("hidden_act", "silu"), ("attention_bias", False)):
        if values.get(name, only) != only:
            raise invalid(f"{where}: {name}", repr(values[name]), repr(only))
    fields = {field.name: field for field in dataclasses.fields(EncoderConfig)}
    flat = {name: value for name, value in values.items() if name in fields and value is not None}
    if "num_hidden_layers" in values:
        flat["num_hidden_layers"] = values["num_hidden_layers"]
    for name, value in flat.items():
        if name == "layer_types":
            allowed = "a list of 'linear_attention' and 'full_attention'"
            kinds = ("linear_attention", "full_attention")
            if not isinstance(value, (list, tuple)) or any(kind not in kinds for kind in value):
                raise invalid(f"{where}: {name}", repr(value), allowed)
            flat[name] = tuple(value)
        elif name == "last_mlp":
            if not isinstance(value, bool):
                raise wrong_type(f"{where}: {name}", value, "True or False")
        elif isinstance(value, bool) or not isinstance(value, (int, float)):
            raise wrong_type(f"{where}: {name}", value, "a number")
        elif not 0 < value < 2**40 or (name in EncoderConfig.open_fields[2:]) < (value != int(value)):
            raise invalid(f"{where}: {name}", repr(value), "a number above 0, whole if it counts something")
    return flat


def _infer(path: Path, found: dict[str, tuple[int, ...]], given: list[tuple[str, dict[str, Any]]]) -> EncoderConfig:
    """The configuration from shapes and then from what was given; what shapes decide must agree with what was given."""
    default = EncoderConfig()

    def size(suffix: str, axis: int, otherwise: int, axes: int) -> int:
        """The most frequent size of an axis over all layers: one odd layer is then the one that gets named."""
        sizes = Counter(
            s[axis] for name, s in found.items() if name.endswith(suffix) and len(s) == axes and s[axis] > 0
        )
        return sizes.most_common(1)[0][0] if sizes else otherwise

    kinds: dict[int, str] = {}
    for name in found:
        match = re.match(r"layers\.(0|[1-9]\d{0,8})\.", name)
        if match:
            kind = "full_attention" if ".self_attn." in name else "linear_attention" if ".linear_attn." in name else ""
            kinds[int(match[1])] = kinds.get(int(match[1])) or kind
    layers = max(kinds, default=-1) + 1
    if not 0 < layers <= _MOST_LAYERS:
        raise invalid("path", f"{str(path)!r} with {layers} layers", f"1 to {_MOST_LAYERS} layers, numbered from 0")
    if "linear_attention" not in kinds.values():
        got = f"{str(path)!r} without a recurrent layer (linear_attn), as Qwen3 is"
        raise invalid("path", got, "a Qwen3.5 text model; Anima's own Qwen3-0.6B needs no other loader than ComfyUI's")
    usual = ["full_attention" if (i + 1) % 4 == 0 else "linear_attention" for i in range(layers)]
    last = f"layers.{layers - 1}."
    headless = "norm.weight" in found and not any(name.startswith(("norm.0.", "norm.1.", "norm.3.")) for name in found)

    head_dim = size(".self_attn.q_norm.weight", 0, default.head_dim, 1)
    value_heads = size(".linear_attn.A_log", 0, default.linear_num_value_heads, 1)
    value_dim = size(".linear_attn.norm.weight", 0, default.linear_value_head_dim, 1)
    mixed = size(".linear_attn.in_proj_qkv.weight", 0, 0, 2)
    keys = (
        (mixed - value_heads * value_dim) // 2 if mixed else default.linear_num_key_heads * default.linear_key_head_dim
    )
    decided: dict[str, Any] = {
        "vocab_size": size("embed_tokens.weight", 0, default.vocab_size, 2),
        "hidden_size": size(".input_layernorm.weight", 0, default.hidden_size, 1),
        "intermediate_size": size(".mlp.gate_proj.weight", 0, default.intermediate_size, 2),
        "layer_types": tuple(kinds.get(i) or usual[i] for i in range(layers)),
        "num_hidden_layers": layers,
        "last_mlp": headless or any(n.startswith((last + "mlp.", last + "post_attention")) for n in found),
        "num_attention_heads": max(size(".self_attn.q_proj.weight", 0, 0, 2) // (2 * head_dim), 1),
        "num_key_value_heads": max(size(".self_attn.k_proj.weight", 0, 0, 2) // head_dim, 1),
        "head_dim": head_dim,
        "linear_num_value_heads": value_heads,
        "linear_value_head_dim": value_dim,
        "linear_conv_kernel_dim": size(".linear_attn.conv1d.weight", 2, default.linear_conv_kernel_dim, 3),
        "head_size": None if headless else size("norm.0.weight", 0, default.output_size, 2),
    }
    open_values: dict[str, Any] = {}
    for where, values in given:
        for name, value in values.items():
            if name in decided and decided[name] != value:
                raise invalid(f"{where}: {name}", repr(value), f"{decided[name]!r}, as the tensors of {path.name}")
            if name in EncoderConfig.open_fields:
                open_values.setdefault(name, value)
    heads, width = open_values.pop("linear_num_key_heads", None), open_values.pop("linear_key_head_dim", None)
    if width is None:
        width = keys // heads if heads else value_dim
    if heads is None:
        heads = keys // width
    if keys <= 0 or heads * width != keys or value_heads % heads:
        got = f"in_proj_qkv of {mixed} rows with {value_heads} value heads of {value_dim} and key heads of {width}"
        allowed = "2 x key heads x their width + value heads x theirs, value heads a multiple of key heads; "
        raise invalid("path", f"{str(path)!r}: {got}", allowed + "config: linear_num_key_heads, linear_key_head_dim")
    sizes = EncoderConfig(
        **{name: value for name, value in decided.items() if name != "num_hidden_layers"},
        linear_num_key_heads=heads,
        linear_key_head_dim=width,
        **open_values,
    )
    rotary = sizes.partial_rotary_factor * sizes.head_dim
    if not 2 <= rotary <= sizes.head_dim or int(rotary) % 2:
        allowed = f"a share of head_dim {sizes.head_dim} that is an even number of at least 2"
        raise invalid("partial_rotary_factor", repr(sizes.partial_rotary_factor), allowed)
    if sizes.num_attention_heads % sizes.num_key_value_heads:
        got = f"{sizes.num_attention_heads} query heads and {sizes.num_key_value_heads} key heads"
        raise invalid("path", f"{str(path)!r}: {got}", "query heads a multiple of key heads")
    return sizes


def _compare(
    path: Path,
    prefix: str,
    found: dict[str, tuple[int, ...]],
    expected: dict[str, tuple[int, ...]],
    unknown: list[str],
) -> None:
    """Every tensor once, none missing, none over, each of its shape."""
    problems = []
    missing = [prefix + name for name in expected if name not in found]
    if missing:
        problems.append(f"missing {_listed(missing)}")
    extra = sorted([prefix + name for name in found if name not in expected] + unknown)
    if extra:
        problems.append(f"not of this model {_listed(extra)}")
        if any(
            name.endswith(("scale_weight", "weight_scale", "comfy_quant", "scaled_fp8", "input_scale"))
            for name in extra
        ):
            problems.append("(scaled FP8 is not supported, plain E4M3 casts are)")
    shaped = [
        f"{prefix}{name} {list(found[name])}, not {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    if shaped:
        problems.append(f"of a wrong shape {_listed(shaped)}")
    if problems:
        allowed = f"the {len(expected)} tensors of its configuration, each once and of its shape"
        raise invalid("path", f"{str(path)!r}: tensors " + "; ".join(problems), allowed)


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return ", ".join(names[:_MOST_NAMED]) + more


def _read(
    path: Path,
    prefix: str,
    own: dict[str, tuple[Path, tuple[int, ...], str]],
    device: torch.device,
    progress: bool | None,
) -> dict[str, torch.Tensor]:
    """The tensors, in the order of the files; each is looked through for NaN and infinity as it comes."""
    from safetensors import SafetensorError, safe_open
    from tqdm import tqdm

    tensors, bad = {}, []
    total = sum(_TYPES[kind][0].itemsize * torch.Size(shape).numel() for _, shape, kind in own.values())
    disable = None if progress is None else not progress
    with tqdm(total=total, unit="B", unit_scale=True, desc=path.name, disable=disable) as bar:
        for file in dict.fromkeys(entry[0] for entry in own.values()):
            try:
                with safe_open(file, framework="pt") as handle:
                    for name in (name for name, entry in own.items() if entry[0] == file):
                        tensor = handle.get_tensor(prefix + name)
                        if not _finite(tensor, own[name][2]):
                            bad.append(prefix + name)
                        tensors[name] = tensor.to(device)
                        bar.update(tensor.nbytes)
            except (SafetensorError, OSError, RuntimeError) as error:
                got = f"{str(file)!r}, which cannot be read ({error})"
                raise invalid("path", got, "a whole safetensors file") from error
    if bad:
        raise invalid("path", f"{str(path)!r} with NaN or infinity in {_listed(bad)}", "finite numbers")
    return tensors


def _finite(tensor: torch.Tensor, kind: str) -> bool:
    """Whether every number is finite, told by its bits (FP8 has no comparisons) and in blocks that fit a cache."""
    _, whole, mask = _TYPES[kind]
    blocks = tensor.reshape(-1).view(whole).split(_BLOCK)
    return not any(int((block & mask).max()) == mask for block in blocks if block.numel())
