"""Prompts: ComfyUI's weights in them, and batches of similar length.

    a (red:1.3) cat, (((fluffy))), \\(not a weight\\)

Round brackets multiply the weight of what they hold by 1.1, each pair again; `:number` before the closing one sets it
instead; a bracket after a backslash is only a bracket. Anima applies weights to its adapter's T5 tokens and none to the
text encoder, so here they are taken out of the text, and the text is cut where a weight changes, as ComfyUI cuts it:
the pieces are tokenized one by one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

__all__ = ["batches", "pieces"]

# Characters that no prompt holds stand for brackets behind a backslash while the others are looked at.
_OPEN, _CLOSE = "\0\2", "\0\1"


def pieces(prompt: str) -> list[tuple[str, float]]:
    """The text of a prompt in pieces of one weight, none of them empty.

    Example:
        >>> pieces("a (red:1.3) (big) cat")
        [('a ', 1.0), ('red', 1.3), (' ', 1.0), ('big', 1.1), (' cat', 1.0)]
    """
    hidden = prompt.replace("\\)", _CLOSE).replace("\\(", _OPEN)
    plain = ((text.replace(_CLOSE, ")").replace(_OPEN, "("), weight) for text, weight in _weighted(hidden, 1.0))
    return [(text, weight) for text, weight in plain if text]


def _weighted(text: str, weight: float) -> Iterator[tuple[str, float]]:
    for group in _groups(text):
        if not (len(group) > 1 and group[0] == "(" and group[-1] == ")"):
            yield group, weight
            continue
        inside, new = group[1:-1], weight * 1.1
        before, colon, number = inside.rpartition(":")
        if colon and before:
            try:
                inside, new = before, float(number)
            except ValueError:
                inside = group[1:-1]
        yield from _weighted(inside, new)


def _groups(text: str) -> Iterator[str]:
    """Outermost bracketed groups and the text between them. A bracket without a partner is text; after a closing one
    too many, groups begin again only where the count of opening ones has caught up, as in ComfyUI."""
    depth = start = 0
    for i, character in enumerate(text):
        if character == "(":
            if depth == 0 and i > start:
                yield text[start:i]
                start = i
            depth += 1
        elif character == ")":
            depth -= 1
            if depth == 0:
                yield text[start : i + 1]
                start = i + 1
    if start < len(text):
        yield text[start:]


def batches(lengths: Sequence[int], tokens: int) -> Iterator[list[int]]:
    """Positions of prompts in batches of similar length, each of at most `tokens` with padding (or of one prompt)."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if batch and lengths[i] * (len(batch) + 1) > tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch
