"""A run with broken checkpoints goes on from the newest whole one; one that does not belong is refused, untouched."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from orchestrator.errors import CheckpointError, ConfigError
from orchestrator.runtime.checkpoints import CheckpointStore, verify
from orchestrator.runtime.collective import Solo
from tests.support import blobs, mlp
from tests.unit.small_runs import Damage, events, readings_of, saved_steps, trained


def newest(run: Path) -> Path:
    return run / "run" / "checkpoints" / "step-000000007"


def tensors(run: Path) -> Path:
    (found,) = newest(run).glob("*.distcp")
    return found


def cut(file: Path, to: float) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * to)])


def flip(file: Path, at: float) -> None:
    data = bytearray(file.read_bytes())
    data[int(len(data) * at)] ^= 1
    file.write_bytes(data)


def reseal(checkpoint: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a checkpoint's metadata and make its manifest agree, as another version's code would have written it."""
    meta = json.loads((checkpoint / "meta.json").read_text())
    store = CheckpointStore(checkpoint.parent.parent / "elsewhere", keep=1, collective=Solo())
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    written = store.save(model, optimizer, step=7, meta=change(meta) or meta)
    shutil.rmtree(checkpoint)
    written.rename(checkpoint)


def broken(run: Path, *steps: int) -> None:
    for step in steps:
        (file,) = (run / "run" / "checkpoints" / f"step-{step:09d}").glob("*.distcp")
        cut(file, 0.5)


def leftover(run: Path) -> None:
    partial = run / "run" / "checkpoints" / ".step-000000009.partial"
    shutil.copytree(newest(run), partial)
    cut(partial / "__0_0.distcp", 0.3)


def replaced_by_a_file(run: Path) -> None:
    shutil.rmtree(newest(run))
    newest(run).write_text("not a folder")


def emptied(run: Path) -> None:
    shutil.rmtree(newest(run))
    newest(run).mkdir()


# What was done, and what the event says about the newest checkpoint; None: it is still good.
RECOVERED: list[tuple[str, Damage, str | None]] = [
    ("tensors truncated", lambda run: cut(tensors(run), 0.5), "bytes"),
    ("tensors truncated by a byte", lambda run: cut(tensors(run), 0.9999), "bytes"),
    ("tensors empty", lambda run: cut(tensors(run), 0), "0 bytes"),
    ("a bit of the first tensor flipped", lambda run: flip(tensors(run), 0.2), "checksum"),
    ("a bit at the end flipped", lambda run: flip(tensors(run), 0.999), "checksum"),
    ("tensors missing", lambda run: tensors(run).unlink(), "FileNotFoundError"),
    ("tensor index missing", lambda run: (newest(run) / ".metadata").unlink(), "FileNotFoundError"),
    ("tensor index flipped", lambda run: flip(newest(run) / ".metadata", 0.5), "checksum"),
    ("manifest missing", lambda run: (newest(run) / "manifest.json").unlink(), "FileNotFoundError"),
    ("manifest truncated", lambda run: cut(newest(run) / "manifest.json", 0.6), "JSONDecodeError"),
    ("manifest empty", lambda run: cut(newest(run) / "manifest.json", 0), "JSONDecodeError"),
    ("manifest of nothing", lambda run: (newest(run) / "manifest.json").write_text("{}"), ""),
    ("manifest a list", lambda run: (newest(run) / "manifest.json").write_text("[]"), ""),
    ("manifest of numbers", lambda run: (newest(run) / "manifest.json").write_text('{"meta.json": 3}'), ""),
    ("manifest not text", lambda run: (newest(run) / "manifest.json").write_bytes(b"\xff\xfe\x00"), "Error"),
    ("metadata missing", lambda run: (newest(run) / "meta.json").unlink(), "FileNotFoundError"),
    ("metadata truncated", lambda run: cut(newest(run) / "meta.json", 0.5), "bytes"),
    ("metadata changed", lambda run: flip(newest(run) / "meta.json", 0.3), "checksum"),
    ("folder empty", emptied, "FileNotFoundError"),
    ("a file in the folder's place", replaced_by_a_file, "NotADirectoryError"),
    ("newest two broken", lambda run: broken(run, 6, 7), "bytes"),
    ("a partial one left over", leftover, None),
    ("a partial one without files", lambda run: (newest(run).parent / ".step-000000008.partial").mkdir(), None),
    ("foreign files beside", lambda run: (newest(run).parent / "step-best").mkdir(), None),
    ("a foreign file inside", lambda run: (newest(run) / "notes.txt").write_text("mine"), None),
    ("older ones gone", lambda run: [shutil.rmtree(newest(run).with_name(f"step-00000000{s}")) for s in (4, 6)], None),
]


@pytest.mark.parametrize(("damage", "told"), [c[1:] for c in RECOVERED], ids=[c[0] for c in RECOVERED])
def test_a_broken_checkpoint_is_passed_over_and_nothing_is_lost(
    run: Path, whole: list[tuple[Any, ...]], damage: Damage, told: str | None
) -> None:
    damage(run)
    trained(run, resume=True)
    passed = events(run, "checkpoint_passed_over")
    if told is None:
        assert passed == []
    else:
        assert str(newest(run)) in passed[0]["reason"]
        assert told in passed[0]["reason"]
    resumed_at = {None: 7}.get(told, 4 if len(passed) == 2 else 6)
    assert [e["step"] for e in events(run, "resumed")] == [resumed_at]
    assert readings_of(run) == whole
    # What is kept can be used: the newest is the end's.
    assert saved_steps(run)[-1] == 10
    assert [verify(newest(run).with_name(f"step-{step:09d}")) for step in saved_steps(run)[-2:]] == [None, None]


def without(key: str) -> Damage:
    return lambda run: [reseal(newest(run), lambda meta: meta.pop(key) and None)]


@dataclass(frozen=True)
class Refusal:
    name: str
    damage: Damage
    told: tuple[str, ...]
    more: Callable[[], dict[str, Any]] = dict


FIT = ("does not fit this model and optimizer", "resume with the config and the code that wrote it")
REFUSED = [
    Refusal(
        "all broken", lambda run: broken(run, 4, 6, 7), ("no checkpoint under", "step-000000004", "begin a new run")
    ),
    Refusal(
        "another width",
        lambda run: None,
        (*FIT, "5 of another shape or dtype: 0.weight (32 x 20 float32 there, 16 x 20 float32 here), 0.bias", "1 more"),
        lambda: {"model": mlp(width=16)},
    ),
    Refusal(
        "a layer more",
        lambda run: None,
        (*FIT, "2 in this model alone: 5.weight (4 x 4 float32), 5.bias (4 float32)"),
        lambda: {"model": nn.Sequential(*mlp(), nn.Linear(4, 4))},
    ),
    Refusal(
        "a layer less",
        lambda run: None,
        (*FIT, "2 in the checkpoint alone: 4.weight (4 x 32 float32), 4.bias (4 float32)"),
        lambda: {"model": nn.Sequential(*list(mlp())[:3])},
    ),
    Refusal(
        "another dtype",
        lambda run: None,
        (*FIT, "6 of another shape or dtype: 0.weight (32 x 20 float32 there, 32 x 20 float64 here)"),
        lambda: {"model": mlp().double()},
    ),
    Refusal("another optimizer", lambda run: None, FIT, lambda: {"optimizer": lambda p: torch.optim.Adam(p, lr=0.01)}),
    Refusal(
        "another seed",
        lambda run: None,
        ("run.seed: 1", "the run was trained with 0", "write 0 again"),
        lambda: {"sections": {"run": {"seed": 1}}},
    ),
    Refusal("more data", lambda run: None, ("dataset_size 256", "257 now"), lambda: {"dataset": blobs(257)}),
    Refusal("less data", lambda run: None, ("dataset_size 256", "200 now"), lambda: {"dataset": blobs(200)}),
    Refusal("no controller", without("controller"), ("another version", "controller")),
    Refusal("no generator", without("rng"), ("another version", "rng")),
    Refusal(
        "a controller of another version",
        lambda run: reseal(newest(run), lambda meta: meta | {"controller": '{"type": "Brain2"}'}),
        ("another version",),
    ),
]


def files(run: Path) -> dict[Path, bytes]:
    return {p: p.read_bytes() for p in (run / "run" / "checkpoints").rglob("*") if p.is_file()}


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.name)
def test_a_checkpoint_that_does_not_belong_is_refused_and_left_as_it_is(run: Path, case: Refusal) -> None:
    case.damage(run)
    before = files(run)
    with pytest.raises((CheckpointError, ConfigError)) as caught:
        trained(run, resume=True, **case.more())
    for words in case.told:
        assert words in str(caught.value)
    assert "Traceback" not in str(caught.value)
    assert files(run) == before


def test_a_run_that_lost_all_its_checkpoints_begins_again_and_says_so(run: Path, whole: list[tuple[Any, ...]]) -> None:
    shutil.rmtree(run / "run" / "checkpoints")
    trained(run, resume=True)
    assert [(e["attempt"], e["step"]) for e in events(run, "started")] == [(1, 0), (2, 0)]
    assert readings_of(run) == whole


def test_the_tables_hold_at_least_30_broken_checkpoints() -> None:
    assert len(RECOVERED) + len(REFUSED) >= 30
