"""The command line answers at once, and has not loaded a framework when it refuses."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
REPORT = (
    "import sys\n"
    "from launch.cli import main\n"
    "try:\n"
    "    main(sys.argv[1:], prog_name='groundswell')\n"
    "finally:\n"
    "    print('LOADED', *({'torch', 'ray', 'matplotlib', 'sklearn'} & set(sys.modules)))\n"
)


def call(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", REPORT, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--help"], 0, "Commands:"),
        (["run", "--help"], 0, "Exit codes:"),
        (["doctor", "-h"], 0, "--no-ray"),
        (["ledger", "verify", "--help"], 0, "exactly once"),
        (["probe", "--help"], 0, "without training it"),
        (["probe", "digts"], 2, "did you mean digits?"),
        (["torchrun", "--help"], 0, "--rdzv-endpoint"),
        (["torchrun", "digits", "--nnodes", "2"], 2, "give all of them the same ones"),
        (["torchrun", "digits", "--nnodes", "4:1"], 2, "must count from at least 1 up"),
        (["torchrun", "digits", "--rdzv-endpoint", "head:http"], 2, "is not HOST:PORT"),
        (["torchrun", "digits", "--rdzv-conf", "last_call"], 2, "is not KEY=VALUE"),
        (["torchrun", "digits", "--run-dir", "EMPTY", "--resume"], 2, "holds no run to resume"),
        (["torchrun", "digits", "--run-dir", "TAKEN"], 2, "already holds a run; pass --resume"),
        (["plot", "--help"], 0, "Draw the run"),
        (["checkpoints", "--help"], 0, "nothing is changed"),
        (["checkpoints", "ls", "EMPTY"], 2, "holds no checkpoint"),
        (["checkpoints", "verify", "--help"], 0, "where one is torn"),
        (["checkpoints", "export", "EMPTY", "--to", "weights.bin"], 2, "must end in .pt or .safetensors"),
        (["k8s", "--help"], 0, "KubeRay"),
        (["k8s", "render", "digits_on_kubernetes"], 0, "kind: RayJob"),
        (["k8s", "validate", "digits_on_kubernetes"], 0, "OK digits_on_kubernetes"),
        (["--version"], 0, "groundswell "),
        (["config", "validate", "digits"], 0, "OK digits"),
        (["config", "validate", "digts"], 2, "did you mean digits?"),
        (["run", "digits", "--set", "batch.intial=3"], 2, "did you mean batch.initial?"),
        (["run", "digits", "--runtime", "slurm"], 2, "is not one of"),
        (["run", "digits", "--runtime", "local", "--address", "1.2.3.4:6379"], 2, "does not use"),
        (["run", "digits", "--run-dir", "EMPTY", "--resume"], 2, "holds no run to resume"),
        (["run", "digits", "--run-dir", "TAKEN"], 2, "already holds a run; pass --resume"),
        (["run", "digits", "--run-dir", "EMPTY", "--address", "127.0.0.1:1"], 2, "nobody answers at 127.0.0.1:1"),
        (["ledger", "verify", "EMPTY"], 2, "ledger: true"),
        (["control", "--help"], 0, "ends the hold"),
        (["control", "EMPTY", "hold"], 1, "is not the folder of a run"),
        (["control", "EMPTY", "cap"], 2, "cap needs --max-batch"),
        (["submit", "--help"], 0, "goes on from its newest whole checkpoint"),
        (["status", "--help"], 0, "status [OPTIONS] RUN"),
        (["logs", "--help"], 0, "--follow"),
        (["stop", "--help"], 0, "with a checkpoint"),
        (["list", "--help"], 0, "--address"),
        (["submit", "digits", "--set", "batch.intial=3"], 2, "did you mean batch.initial?"),
        (["submit", "digits"], 2, "write a folder that all nodes share"),
        (["submit", "digits", "--run-dir", "/x", "--address", "127.0.0.1:1"], 2, "nobody answers at"),
        (["list", "--address", "127.0.0.1:1"], 2, "nobody answers at http://127.0.0.1:1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_no_framework_is_loaded_to_answer_or_to_refuse(
    arguments: list[str], code: int, said: str, tmp_path: Path
) -> None:
    taken = tmp_path / "taken" / "digits"
    taken.mkdir(parents=True)
    (taken / "config.yaml").touch()
    (taken / "events.jsonl").write_text('{"attempt": 1, "kind": "started"}\n')
    places = {"EMPTY": str(tmp_path / "empty"), "TAKEN": str(taken.parent)}
    done = call(*(places.get(argument, argument) for argument in arguments))
    if "ledger" not in arguments or code == 0:
        assert done.stdout.splitlines()[-1].strip() == "LOADED"
    assert done.returncode == code, done.stderr
    assert said in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "empty").exists()


def test_help_takes_well_under_a_second() -> None:
    took_s = []
    for _ in range(3):
        began_s = _children_cpu_s()
        subprocess.run([sys.executable, "-m", "launch.cli", "--help"], check=True, capture_output=True, cwd=ROOT)
        took_s.append(_children_cpu_s() - began_s)
    # Of the processor, since the rest is how busy the machine is; nothing in it waits.
    assert min(took_s) < 0.7, took_s


def _children_cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
