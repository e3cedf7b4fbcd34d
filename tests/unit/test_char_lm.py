"""The language model: its windows are the text, it never looks ahead, it learns, and it refuses what is no text."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.errors import TaskError
from orchestrator.tasks.protocol import build_task
from tests.unit.small_tasks import SMALL_LM, batch_of


def test_char_lm_windows_are_the_text_and_the_held_out_ones_its_end(tmp_path: Path) -> None:
    text = "".join(chr(ord("a") + i % 26) + "äß€🙂"[i % 4] for i in range(500))
    path = tmp_path / "text.txt"
    path.write_text(text, encoding="utf-8")
    task = build_task("char_lm", {**SMALL_LM, "text": str(path), "held_out_fraction": 0.2})

    def spelled(dataset: Any) -> str:
        return "".join(task.vocabulary[int(t)] for i in range(len(dataset)) for t in dataset[i])

    train, held_out = spelled(task.train_set), spelled(task.eval_set)
    assert text.startswith(train + held_out)
    assert len(text) - len(train + held_out) < 17
    assert len(task.eval_set) == round(0.2 * (len(task.train_set) + len(task.eval_set)))
    assert task.train_set[0].shape == (17,)


def test_char_lm_reads_the_language_reference_by_default() -> None:
    task = build_task("char_lm", SMALL_LM)
    count = (len(task.train_set) + len(task.eval_set)) * 17
    assert count > 300_000
    assert {"d", "e", "f", " ", "\n"} <= set(task.vocabulary)


def test_char_lm_never_looks_ahead() -> None:
    model = build_task("char_lm", SMALL_LM).model().eval()
    tokens = torch.arange(16).view(1, 16)
    changed = tokens.clone()
    changed[0, 9:] += 20
    with torch.no_grad():
        one, other = model(tokens), model(changed)
    assert torch.allclose(one[:, :9], other[:, :9], atol=1e-6)
    assert not torch.allclose(one[:, 9:], other[:, 9:], atol=1e-3)


def test_char_lm_dropout_only_while_training() -> None:
    model = build_task("char_lm", {**SMALL_LM, "dropout": 0.5}).model()
    tokens = torch.arange(16).view(1, 16)
    with torch.no_grad():
        assert not torch.equal(model(tokens), model(tokens))
        model.eval()
        assert torch.equal(model(tokens), model(tokens))


def test_char_lm_learns_a_rule(tmp_path: Path) -> None:
    (tmp_path / "t").write_text("abcd" * 2000)
    task = build_task("char_lm", {**SMALL_LM, "text": str(tmp_path / "t")})
    torch.manual_seed(0)
    model = task.model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        task.loss(model, batch_of(task.train_set, 16)).backward()
        optimizer.step()
    with torch.no_grad():
        metrics = {k: float(v) for k, v in task.metrics(model.eval(), batch_of(task.eval_set, 16)).items()}
    assert metrics["accuracy"] > 0.99
    assert metrics["bits_per_character"] < 0.1
    assert metrics["bits_per_character"] == pytest.approx(metrics["loss"] / math.log(2))


def test_char_lm_refuses_text_that_is_not_utf8_or_too_short(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes(b"caf\xe9 " * 100)
    with pytest.raises(TaskError, match="not UTF-8: byte 0xe9 at offset 3"):
        build_task("char_lm", {"text": str(path)})
    path.write_text("a" * 33)
    with pytest.raises(TaskError, match=r"33 characters.* context of at most 15"):
        build_task("char_lm", {**SMALL_LM, "text": str(path)})
    assert len(build_task("char_lm", {**SMALL_LM, "context": 15, "text": str(path)}).eval_set) == 1
    path.write_text("")
    with pytest.raises(TaskError, match="0 characters"):
        build_task("char_lm", {"text": str(path)})
    with pytest.raises(TaskError, match="could not be read"):
        build_task("char_lm", {"text": str(tmp_path)})
