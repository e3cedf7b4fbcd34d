"""The script for Slurm, with stand-ins for Slurm's commands: two nodes of one job, notice, and the job queued again."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from launch.cli import main
from orchestrator.config import to_yaml
from orchestrator.runtime import folder
from orchestrator.runtime.ledger import verify
from tests import support

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "launch" / "slurm" / "groundswell.sbatch"
# As Slurm's own: srun starts the command once a node and ends with the worst of their codes, and SIGTERM makes it kill
# them; scancel signals the tasks of the step.
STAND_INS = {
    "srun": """
while [[ $1 == --* ]]; do shift; done
echo "$@" >>"$STATE/srun.said"
tasks=()
for node in 0 1; do SLURM_NODEID=$node "$@" & tasks+=($!); done
trap 'kill -KILL "${tasks[@]}"' TERM
echo "${tasks[@]}" >"$STATE/$SLURM_JOB_ID.0"
worst=0
for task in "${tasks[@]}"; do wait "$task"; code=$?; ((code > worst)) && worst=$code; done
exit "$worst"
""",
    "scontrol": """
case "$1 $2" in
    "show hostnames") printf '127.0.0.1\\n127.0.0.9\\n' ;;
    "show job") cat "$STATE/job" ;;
    "requeue $SLURM_JOB_ID") touch "$STATE/requeued" ;;
    *) exit 1 ;;
esac
""",
    "scancel": """
[[ $1 == --signal=TERM ]] && read -r -a tasks <"$STATE/$2" && kill -TERM "${tasks[@]}"
""",
    "groundswell": 'exec "$PYTHON" -m launch.cli "$@"\n',
}


class Slurm:
    """One job, which may be queued again."""

    def __init__(self, place: Path) -> None:
        self.state = place / "state"
        self.state.mkdir()
        self.bin = place / "bin"
        self.bin.mkdir()
        for name, body in STAND_INS.items():
            (self.bin / name).write_text(f"#!/usr/bin/env bash\n{body}")
            (self.bin / name).chmod(0o755)

    def start(self, *arguments: str, restarts: int = 0) -> subprocess.Popen[str]:
        (self.state / "job").write_text("JobId=4711 JobName=groundswell\n   JobState=RUNNING Reason=None\n")
        env = {**os.environ, "PATH": f"{self.bin}:{os.environ['PATH']}", "PYTHON": sys.executable}
        env |= {"STATE": str(self.state), "SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "node[1-2]"}
        env |= {"SLURM_JOB_NUM_NODES": "2", "SLURM_RESTART_COUNT": str(restarts), "GROUNDSWELL_EXEC": "env READY=1"}
        command = ["bash", str(SCRIPT), *arguments]
        out = subprocess.PIPE
        return subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=out, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )

    def requeued(self) -> bool:
        return (self.state / "requeued").exists()


def until(there: Callable[[], object], *, patience_s: float = 90.0) -> None:
    end_s = time.monotonic() + patience_s
    while not there():
        assert time.monotonic() < end_s, "it did not happen"
        time.sleep(0.05)


@pytest.mark.dist
@pytest.mark.timeout(300)
def test_a_job_that_is_given_notice_saves_is_queued_again_and_finishes(tmp_path: Path) -> None:
    slurm = Slurm(tmp_path)
    (tmp_path / "slow").touch()
    settings = support.config(
        tmp_path,
        task={
            "name": "tests.launch.small_task:make",
            "options": {"sleep_s": 0.05, "sleep_while": str(tmp_path / "slow")},
        },
        train={"samples": 6400},
        checkpoint={"every_samples": 3200},
        ledger=True,
    )
    (tmp_path / "given.yaml").write_text(to_yaml(settings))
    run = tmp_path / "run"
    job = slurm.start(str(tmp_path / "given.yaml"))
    try:
        until(lambda: len(list(folder.rows(run / folder.METRICS))) > 2)
        job.send_signal(signal.SIGTERM)
        said, _ = job.communicate(timeout=90)
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
    assert job.returncode == 130, said
    assert slurm.requeued()
    assert "env READY=1 groundswell torchrun" in (slurm.state / "srun.said").read_text()
    stopped = [row for row in folder.rows(run / folder.EVENTS) if row["kind"] == "stopped"]
    assert len(stopped) == 1
    assert 0 < stopped[0]["samples_seen"] < 3200, "saved between two checkpoints"

    (tmp_path / "slow").unlink()
    with slurm.start(str(tmp_path / "given.yaml"), restarts=1) as job:
        said, _ = job.communicate(timeout=90)
    assert job.returncode == 0, said
    begun = [row for row in folder.rows(run / folder.EVENTS) if row["kind"] in ("started", "resumed")]
    assert [row["world_size"] for row in begun] == [2, 2]
    assert begun[1]["samples_seen"] == stopped[0]["samples_seen"]
    assert verify(run).text.startswith("exactly once: 6400 positions")


def test_a_job_that_is_cancelled_is_not_queued_again(tmp_path: Path) -> None:
    slurm = Slurm(tmp_path)
    (slurm.bin / "groundswell").write_text("#!/usr/bin/env bash\ntrap 'exit 130' TERM\nwhile :; do sleep 0.1; done\n")
    job = slurm.start("any")
    until(lambda: list(slurm.state.glob("*.0")))
    (slurm.state / "job").write_text("JobId=4711\n   JobState=CANCELLED\n")
    time.sleep(0.5)  # for the tasks to set their traps
    job.send_signal(signal.SIGTERM)
    job.communicate(timeout=30)
    assert job.returncode == 130
    assert not slurm.requeued()


def test_the_script_is_clean_and_where_the_command_says() -> None:
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert shellcheck is not None, "pip install -e '.[dev]' brings it"
    done = subprocess.run([shellcheck, str(SCRIPT)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    said = CliRunner().invoke(main, ["torchrun", "--slurm-script"])
    assert said.output.strip() == str(SCRIPT)
