"""A language model over characters, on any UTF-8 text file; by default on the language reference inside CPython."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import final

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset

from orchestrator.errors import TaskError
from orchestrator.tasks.gpt import GPT, GPTShape


def char_lm(
    *,
    text: str | None = None,
    context: int = 64,
    width: int = 96,
    depth: int = 2,
    heads: int = 4,
    dropout: float = 0.0,
    held_out_fraction: float = 0.1,
) -> CharLMTask:
    """The task ``char_lm``.

    ``text``: path of a UTF-8 text file; left out, the language reference of this Python (``pydoc_data.topics``), so
    numbers compare only between runs of one Python version. ``context`` [characters], ``width``, ``depth``, ``heads``
    and ``dropout`` [fraction] shape the model. ``held_out_fraction`` of the text, its end, is never trained on.
    """
    for name, value in (("context", context), ("width", width), ("depth", depth), ("heads", heads)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise TaskError(f"char_lm: {name} must be a whole number of at least 1, got {value!r}")
    if width % heads:
        divisors = ", ".join(str(n) for n in range(1, min(width, 16) + 1) if width % n == 0)
        raise TaskError(f"char_lm: width {width} cannot be shared out among {heads} heads; heads may be {divisors}")
    if isinstance(dropout, bool) or not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
        raise TaskError(f"char_lm: dropout must be a fraction from 0 to below 1, got {dropout!r}")
    fraction = held_out_fraction
    if isinstance(fraction, bool) or not isinstance(fraction, (int, float)) or not 0 < fraction < 1:
        raise TaskError(f"char_lm: held_out_fraction must lie between 0 and 1, got {fraction!r}")
    characters = _python_reference() if text is None else _read(text)
    vocabulary = sorted(set(characters))
    tokens = _encode(characters, vocabulary)
    train, held_out = _split(tokens, window=context + 1, fraction=fraction)
    shape = GPTShape(
        vocabulary=len(vocabulary), context=context, width=width, depth=depth, heads=heads, dropout=float(dropout)
    )
    return CharLMTask(train, held_out, vocabulary="".join(vocabulary), shape=shape)


@final
class CharLMTask:
    """See ``char_lm``. A batch is tokens [n, context + 1]; every sample counts the same number of predictions."""

    def __init__(self, train: Tensor, held_out: Tensor, *, vocabulary: str, shape: GPTShape) -> None:
        self.train_set = Windows(train)
        self.eval_set = Windows(held_out)
        self.vocabulary = vocabulary  # character of each token, in order
        self._shape = shape

    def model(self) -> nn.Module:
        return GPT(self._shape)

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        return functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())

    def metrics(self, model: nn.Module, batch: Tensor) -> Mapping[str, Tensor]:
        """``loss`` [nats per character], ``bits_per_character``, and the next character's ``accuracy`` [fraction]."""
        scores, following = model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten()
        loss = functional.cross_entropy(scores, following)
        accuracy = (scores.argmax(dim=1) == following).float().mean()
        return {"loss": loss, "bits_per_character": loss / math.log(2), "accuracy": accuracy}


@final
class Windows(Dataset[Tensor]):
    """Windows of a text that do not overlap: sample ``index`` is a row of ``tokens`` [samples, context + 1], int64."""

    def __init__(self, tokens: Tensor) -> None:
        self.tokens = tokens

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> Tensor:
        return self.tokens[index]


def _split(tokens: Tensor, *, window: int, fraction: float) -> tuple[Tensor, Tensor]:
    """Whole windows only, the last ones held out: no character of theirs stands in a training window."""
    count = len(tokens) // window
    if count < 2:
        raise TaskError(
            f"char_lm: the text has {len(tokens)} characters, and training and held-out part need at least one window "
            f"of context + 1 = {window} each; take a longer text, or a context of at most {len(tokens) // 2 - 1}"
            if len(tokens) >= 4
            else f"char_lm: the text has {len(tokens)} characters; take a longer one"
        )
    windows = tokens[: count * window].view(count, window)
    held_out = min(count - 1, max(1, round(count * fraction)))
    return windows[: count - held_out], windows[count - held_out :]


def _encode(characters: str, vocabulary: list[str]) -> Tensor:
    codes = np.frombuffer(characters.encode("utf-32-le"), dtype=np.uint32)
    known = np.array([ord(c) for c in vocabulary], dtype=np.uint32)
    return torch.from_numpy(np.searchsorted(known, codes).astype(np.int64))


def _python_reference() -> str:
    # Imported here: it is half a megabyte of text that other texts have no use for.
    from pydoc_data.topics import topics

    return "".join(topics[name] for name in sorted(topics))


def _read(path: str) -> str:
    if not isinstance(path, str):
        raise TaskError(f"char_lm: text must be the path of a text file, got {path!r}")
    try:
        return Path(path).expanduser().read_bytes().decode("utf-8-sig")
    except FileNotFoundError as error:
        raise TaskError(
            f"char_lm: there is no file {path} (looked for it as {Path(path).absolute()}); give a path that every "
            "worker can read, or leave text out for the built-in one"
        ) from error
    except OSError as error:
        raise TaskError(f"char_lm: {path} could not be read: {error}") from error
    except UnicodeDecodeError as error:
        raise TaskError(
            f"char_lm: {path} is not UTF-8: byte {error.object[error.start]:#04x} at offset {error.start}; convert it, "
            f"for example with: iconv -f LATIN1 -t UTF-8 {path}"
        ) from error
