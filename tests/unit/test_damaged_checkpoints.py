"""Every file of a checkpoint cut short or changed in one byte, in turn: never a silent wrong resume.

The outcome is the checkpoint before it, with the reason; or, of bytes that mean nothing, the very state that was saved.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st

from orchestrator.errors import CheckpointError
from orchestrator.runtime.checkpoint_files import verify, write_manifest
from orchestrator.runtime.checkpoints import CheckpointStore
from orchestrator.runtime.collective import Solo
from tests.support import mlp
from tests.unit.small_runs import events, readings_of, trained

META = {"step": 8, "samples_seen": 256, "controller": '{"type": "Brain"}', "rng": list(range(40))}


def pair(seed: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    model = mlp(8, width=6, seed=seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    model(torch.ones(2, 8)).sum().backward()
    optimizer.step()
    return model, optimizer


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two checkpoints; the older is known by its metadata."""
    folder = tmp_path_factory.mktemp("damaged")
    store = CheckpointStore(folder, keep=2, collective=Solo())
    store.save(*pair(1), step=4, meta={"step": 4})
    store.save(*pair(2), step=8, meta=META)
    return folder


def newest(place: Path) -> Path:
    return place / "step-000000008"


def load(place: Path) -> tuple[dict[str, Any], tuple[Any, ...], dict[str, Any]]:
    """What a resume would have: tensors by name, what was passed over, and the metadata."""
    model, optimizer = pair(3)
    chosen, meta, faults = CheckpointStore(place, keep=2, collective=Solo()).load_latest(model, optimizer)
    assert chosen is not None
    state = {f"{i}.{key}": value for i, s in optimizer.state_dict()["state"].items() for key, value in s.items()}
    return {**model.state_dict(), **state}, faults, meta


def cuts(size: int) -> list[int]:
    """Lengths to cut to: none, some, all but a byte."""
    return sorted({0, 1, size // 4, size // 2, 3 * size // 4, size - 2, size - 1} - {size})


def damages(file: Path) -> Iterator[tuple[str, bytes]]:
    data = file.read_bytes()
    for length in cuts(len(data)):
        yield f"cut to {length}", data[:length]
    yield "a byte more", data + b"\n"
    every = 1 if len(data) < 1500 else len(data) // 400
    for at in range(0, len(data), every):
        changed = bytearray(data)
        changed[at] ^= 1 << (at % 8)
        yield f"byte {at} changed", bytes(changed)


FILES = [".metadata", "__0_0.distcp", "manifest.json", "meta.json"]


def test_the_table_names_every_file(place: Path) -> None:
    assert sorted(file.name for file in newest(place).iterdir()) == FILES


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_cut_or_changed_in_a_byte_is_noticed_before_it_is_used(place: Path, name: str) -> None:
    file = newest(place) / name
    data = file.read_bytes()
    count = 0
    try:
        for what, damaged in damages(file):
            file.write_bytes(damaged)
            why = verify(newest(place))
            count += 1
            if why is None:  # only white space of the manifest means nothing
                assert name == "manifest.json", what
                assert json.loads(damaged) == json.loads(data), what
    finally:
        file.write_bytes(data)
    assert count > 100
    assert verify(newest(place)) is None


@pytest.mark.parametrize("name", FILES)
def test_what_is_resumed_is_the_one_before_or_the_very_state(place: Path, name: str) -> None:
    expected, none, meta = load(place)
    assert (none, meta) == ((), META)
    file = newest(place) / name
    data = file.read_bytes()
    chosen = list(damages(file))
    try:
        for what, damaged in [*chosen[: len(cuts(len(data))) + 1], *chosen[9::40]]:
            file.write_bytes(damaged)
            found, faults, meta = load(place)
            if meta == META:
                assert all(torch.equal(found[key], expected[key]) for key in expected), what
            else:
                assert meta == {"step": 4}, what
                (fault,) = faults
                assert fault.path == str(newest(place)), what
                assert any(not torch.equal(found[key], expected[key]) for key in expected)
    finally:
        file.write_bytes(data)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_manifest_changed_anywhere_in_any_way_vouches_for_nothing_else(place: Path, data: st.DataObject) -> None:
    """Two bytes of the manifest and one of another file: two faults that could agree."""
    manifest, other = newest(place) / "manifest.json", newest(place) / data.draw(st.sampled_from(FILES[:2] + FILES[3:]))
    kept = {file: file.read_bytes() for file in (manifest, other)}
    try:
        for file, times in ((manifest, 2), (other, 1)):
            changed = bytearray(kept[file])
            for _ in range(times):
                changed[data.draw(st.integers(0, len(changed) - 1))] ^= data.draw(st.integers(1, 255))
            if changed == kept[file]:
                return
            file.write_bytes(changed)
        assert verify(newest(place)) is not None
    finally:
        for file, content in kept.items():
            file.write_bytes(content)


def test_a_name_in_the_manifest_that_became_another_files_does_not_hide_its_file(tmp_path: Path) -> None:
    """A byte turns ``__0_0.distcp`` into ``__1_0.distcp``, which is there too, and so leaves the first one out."""
    checkpoint = CheckpointStore(tmp_path, keep=2, collective=Solo()).save(*pair(1), step=4, meta={})
    (checkpoint / "__1_0.distcp").write_bytes((checkpoint / "__0_0.distcp").read_bytes())
    write_manifest(checkpoint)
    assert verify(checkpoint) is None
    text = (checkpoint / "manifest.json").read_text()
    (checkpoint / "manifest.json").write_text(text.replace('"__0_0.distcp"', '"__1_0.distcp"'))
    assert json.loads((checkpoint / "manifest.json").read_text()).keys() == {
        ".metadata",
        "__1_0.distcp",
        "meta.json",
        "manifest.json",
    }
    assert "manifest.json has changed" in str(verify(checkpoint))


def test_where_no_other_is_whole_the_resume_is_refused(tmp_path: Path) -> None:
    CheckpointStore(tmp_path, keep=2, collective=Solo()).save(*pair(1), step=8, meta=META)
    for name in FILES:
        file = newest(tmp_path) / name
        data = file.read_bytes()
        for damaged in (data[:-1], data[: len(data) // 2], b""):
            file.write_bytes(damaged)
            with pytest.raises(CheckpointError, match=r"is whole \(.*begin a new run"):
                load(tmp_path)
        file.write_bytes(data)


@pytest.mark.parametrize("name", FILES)
def test_a_run_goes_on_from_the_one_before_says_so_and_loses_nothing(
    run: Path, whole: list[tuple[Any, ...]], name: str
) -> None:
    file = run / "run" / "checkpoints" / "step-000000007" / name
    data = bytearray(file.read_bytes())
    # In the manifest within a checksum: it stays valid JSON.
    at = data.index(b'"', data.index(b",")) + 3 if name == "manifest.json" else len(data) // 3
    data[at] = ord("0") if data[at] != ord("0") else ord("1")
    file.write_bytes(data)
    trained(run, resume=True)
    (passed,) = events(run, "checkpoint_passed_over")
    assert "step-000000007" in passed["reason"]
    assert "checksum differs" in passed["reason"]
    assert [e["step"] for e in events(run, "resumed")] == [6]
    assert readings_of(run) == whole
