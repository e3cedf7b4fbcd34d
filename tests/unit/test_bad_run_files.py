"""Files of a run that a crash left torn are mended; those that something else changed are refused with the line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from orchestrator.errors import ConfigError, RunFolderError, StorageError
from orchestrator.runtime import folder
from orchestrator.runtime.worker import local_worker
from orchestrator.train import train
from tests.unit.small_runs import (
    ACCEPTED,
    Damage,
    assert_readable,
    groundswell,
    readings_of,
    rows_of,
    saved_steps,
    settings_of,
    trained,
)


def append(name: str, data: bytes) -> Damage:
    def damage(run: Path) -> None:
        with (run / "run" / name).open("ab") as file:
            file.write(data)

    return damage


def in_the_middle(name: str, data: bytes) -> Damage:
    def damage(run: Path) -> None:
        lines = (run / "run" / name).read_bytes().splitlines(keepends=True)
        (run / "run" / name).write_bytes(b"".join([lines[0], data, *lines[1:]]))

    return damage


FILES_MENDED: list[tuple[str, Damage]] = [
    ("metrics torn", append(folder.METRICS, b'{"attempt": 1, "step": 7, "lo')),
    ("metrics end in zeros", append(folder.METRICS, bytes(100))),
    ("metrics end in half a character", append(folder.METRICS, b'{"attempt": 1, "note": "\xe2\x82')),
    ("events torn", append(folder.EVENTS, b'{"attempt": 1, "kind": "che')),
    ("both torn", lambda run: [append(n, b'{"a')(run) for n in (folder.METRICS, folder.EVENTS)]),
    ("metrics missing", lambda run: (run / "run" / folder.METRICS).unlink()),
    ("config unreadable", lambda run: (run / "run" / folder.CONFIG).write_bytes(b"\xff: [")),
    ("a stop that was asked for and never seen", lambda run: (run / "run" / folder.STOP_REQUEST).touch()),
    ("tensorboard missing", lambda run: shutil.rmtree(run / "run" / "tensorboard")),
]


@pytest.mark.parametrize("damage", [c[1] for c in FILES_MENDED], ids=[c[0] for c in FILES_MENDED])
def test_files_that_a_crash_left_torn_or_lost_do_not_stop_a_run_from_going_on(
    run: Path, whole: list[tuple[Any, ...]], damage: Damage
) -> None:
    had_metrics = bool(rows_of(run, "step"))
    damage(run)
    trained(run, resume=True)
    assert had_metrics
    rows = readings_of(run)
    assert rows == whole[-len(rows) :]
    assert len(rows) in (3, 10)  # the last three where the others were lost
    assert_readable(run)


FILES_REFUSED: list[tuple[str, Damage, str]] = [
    ("events hold a line of garbage", in_the_middle(folder.EVENTS, b"garbage\n"), "line 2 is not JSON"),
    ("events hold bytes", in_the_middle(folder.EVENTS, b"\xff\xfe\xff\n"), "line 2"),
    ("events hold a number", in_the_middle(folder.EVENTS, b"42\n"), "line 2"),
    ("events hold another's line", in_the_middle(folder.EVENTS, b'{"level": "info"}\n'), "line 2"),
    ("config missing", lambda run: (run / "run" / folder.CONFIG).unlink(), "no config.yaml"),
]


@pytest.mark.parametrize(("damage", "told"), [c[1:] for c in FILES_REFUSED], ids=[c[0] for c in FILES_REFUSED])
def test_files_that_something_else_changed_are_refused(run: Path, damage: Damage, told: str) -> None:
    damage(run)
    with pytest.raises(RunFolderError, match=told):
        trained(run, resume=True)
    assert saved_steps(run) == [4, 6, 7]


@pytest.mark.parametrize("data", [b"garbage\n", b"\xff\xfe\xff\n", b"42\n", b'{"level": "info"}\n'])
def test_a_reader_of_metrics_that_something_else_changed_is_told_the_line(run: Path, data: bytes) -> None:
    in_the_middle(folder.METRICS, data)(run)
    with pytest.raises(RunFolderError, match="line 2"):
        rows_of(run, "step")


@pytest.mark.parametrize("data", [b"garbage\n", b"\xff\xfe\xff\n", b'{"level": "info"}\n'])
@pytest.mark.parametrize("name", [folder.METRICS, folder.EVENTS])
def test_the_command_shows_no_traceback_of_files_that_something_else_changed(
    tmp_path: Path, name: str, data: bytes
) -> None:
    settings = settings_of(tmp_path, "loss is NaN")
    assert groundswell(settings).exit_code == 1
    in_the_middle(name, data)(tmp_path)
    result = groundswell(settings, "--set", "task.options.kind=sound", "--set", ACCEPTED, "--resume")
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code != 0
    assert "line 2" in result.output


@pytest.mark.parametrize("below", ["", "deeper/still"])
def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("not a folder")
    settings = settings_of(tmp_path / "file" / below)
    with pytest.raises(RunFolderError, match="cannot make the run's folder"):
        train(settings, local_worker(settings), resume=False)
    other = settings_of(tmp_path / "given")
    result = groundswell(other, "--run-dir", str(tmp_path / "file" / below))
    assert result.exit_code != 0
    assert "choose another with --run-dir" in result.output


def test_a_resolved_config_that_cannot_be_written_is_a_clear_error(run: Path) -> None:
    (run / "run" / folder.CONFIG).unlink()
    (run / "run" / folder.CONFIG).mkdir()
    with pytest.raises((StorageError, RunFolderError), match=folder.CONFIG):
        trained(run, resume=True)


def test_a_folder_has_one_writer_and_the_next_begins_a_new_attempt(tmp_path: Path) -> None:
    first = folder.RunWriter(tmp_path)
    first.append(folder.EVENTS, {"kind": "started"})
    with pytest.raises(RunFolderError, match="is being written by another process"):
        folder.RunWriter(tmp_path, patience_s=0.05)
    first.append(folder.EVENTS, {"kind": "finished"})
    first.close()
    second = folder.RunWriter(tmp_path, patience_s=0.05)
    second.append(folder.EVENTS, {"kind": "resumed"})
    second.close()
    assert [row["attempt"] for row in folder.rows(tmp_path / folder.EVENTS)] == [1, 1, 2]


def test_a_run_that_could_not_resume_lets_go_of_its_folder(run: Path) -> None:
    settings = settings_of(run, run={"seed": 1})
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"run\.seed: 1"):
            train(settings, local_worker(settings), resume=True)
    folder.RunWriter(run / "run", patience_s=0.05).close()


@settings(max_examples=200, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 200_000), max_size=4),
    torn=st.sampled_from([b"", b'{"attempt": 1, "st', b"\n", b"no JSON\n", b'{"attempt": 9}']),
)
def test_the_last_line_is_found_from_the_end_of_a_file(sizes: list[int], torn: bytes) -> None:
    with TemporaryDirectory() as place:
        path = Path(place) / folder.METRICS
        assert folder.last_row(path) is None
        lines = [json.dumps({"attempt": 1, "step": step, "text": "x" * size}) for step, size in enumerate(sizes)]
        path.write_bytes("".join(line + "\n" for line in lines).encode() + torn)
        rows = list(folder.rows(path))
        assert folder.last_row(path) == (rows[-1] if rows else None)
        recent = folder.recent_rows(path)
        assert recent == rows[len(rows) - len(recent) :]
        assert len(recent) == len(rows) or sum(map(len, lines[-len(recent) - 1 :])) > 60_000
