"""Qwen3.5's tokenizer: found, checked against the checkpoint, and never Qwen3's in its place.

Both are byte-level BPE over the same text and neither complains about the other's ids, but the ids mean other words:
Qwen3's special tokens begin at 151643 (`<|endoftext|>`), an ordinary word piece of Qwen3.5, whose own begin at 248044
and end at 248076. Its 248,077 ids are fewer than the 248,320 rows of the embedding, which are padded.

Only `tokenizer.json` is read: it holds the whole pipeline, where a class chosen by tokenizer_config.json may split
text by another rule (Qwen2's, for one, knows no combining marks).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ..errors import invalid

__all__ = ["DOWNLOAD", "PAD", "check_tokenizer", "load_tokenizer"]

DOWNLOAD = "Qwen/Qwen3.5-4B"
PAD = "<|endoftext|>"
ROWS = 248320
IDS = {"<|endoftext|>": 248044, "<|im_start|>": 248045, "<|im_end|>": 248046}
QWEN3_IDS = {"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645}


def load_tokenizer(tokenizer: Any, checkpoint: str | os.PathLike[str], rows: int) -> Any:
    """A transformers tokenizer for an encoder with `rows` embeddings.

    Args:
        tokenizer: a directory, a tokenizer.json, or a loaded tokenizer; None: the file beside `checkpoint` (in its
            directory, or there in one of its name without .safetensors, or in `tokenizer/`), else transformers'
            download of Qwen/Qwen3.5-4B, which keeps a copy.

    Raises:
        FileNotFoundError: no file, and no download; says which file to put where.
        ValueError: not Qwen3.5's tokenizer, with the ids that tell.
    """
    if tokenizer is not None and not isinstance(tokenizer, (str, os.PathLike)):
        check_tokenizer(tokenizer, rows, "the tokenizer")
        return tokenizer
    checkpoint = Path(checkpoint)
    home = checkpoint if checkpoint.is_dir() else checkpoint.parent
    if tokenizer is None:
        places = [home, home / checkpoint.stem, home / "tokenizer"]
    else:
        places = [Path(tokenizer)]
    for place in places:
        file = place if place.is_file() else place / "tokenizer.json"
        if file.is_file():
            loaded = _from_json(file)
            check_tokenizer(loaded, rows, repr(str(file)))
            return loaded
    if tokenizer is not None:
        raise FileNotFoundError(f"tokenizer: no tokenizer.json in {str(places[0])!r}")
    loaded = _download(places[:2])
    check_tokenizer(loaded, rows, DOWNLOAD)
    return loaded


def _from_json(file: Path) -> Any:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    try:
        pipeline = Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises plain Exception
        raise invalid("tokenizer", f"{str(file)!r}, which cannot be read ({error})", "a tokenizer.json") from error
    pipeline.no_padding()
    pipeline.no_truncation()
    return PreTrainedTokenizerFast(tokenizer_object=pipeline, pad_token=PAD, eos_token=PAD)


def _download(places: list[Path]) -> Any:
    from transformers.utils import cached_file

    try:
        return _from_json(Path(cached_file(DOWNLOAD, "tokenizer.json")))
    except OSError as error:
        where = " or ".join(repr(str(place)) for place in places)
        raise FileNotFoundError(
            f"tokenizer: none beside the checkpoint, and {DOWNLOAD} cannot be downloaded "
            f"({str(error).splitlines()[0]}). Put the tokenizer.json of {DOWNLOAD} into {where}, or name the "
            "directory it is in: tokenizer=..."
        ) from error


def check_tokenizer(tokenizer: Any, rows: int, what: str) -> None:
    """Refuse a tokenizer whose ids are not those the embedding was trained with."""
    vocabulary = tokenizer.get_vocab()
    ids = {name: vocabulary.get(name) for name in IDS}
    allowed = f"Qwen3.5's: <|endoftext|> is {IDS[PAD]}, and {ROWS} rows of the embedding stand for 248,077 tokens"
    if any(ids[name] == number for name, number in QWEN3_IDS.items()):
        got = f"{what}, a Qwen3 (or Qwen2.5) tokenizer: <|endoftext|> is {ids[PAD]}, a word piece of Qwen3.5"
        raise invalid("tokenizer", f"{got}; every id would read a wrong embedding", allowed)
    if ids[PAD] is None:
        raise invalid("tokenizer", f"{what} without <|endoftext|>", allowed)
    if rows == ROWS and any(number is not None and number != IDS[name] for name, number in ids.items()):
        raise invalid("tokenizer", f"{what} with {ids}", allowed)
    highest = max(vocabulary.values())
    if highest >= rows:
        raise invalid("tokenizer", f"{what} with id {highest}", f"ids below {rows}, the rows of the embedding")
