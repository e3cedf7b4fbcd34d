"""The rooms keep their walls: what each may import, who may read clocks and the environment."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PURE = {"__future__", "collections", "dataclasses", "enum", "functools", "itertools", "math", "statistics", "typing"}

# From the top of the house to its bottom: a room may import those above it, and itself.
ROOMS = [
    "types", "errors", "registry", "core", "ports", "config", "measure", "optim", "tasks", "runtime", "session",
    "train", "ray_train", "report",
]  # fmt: skip


def sources(*folders: str) -> list[Path]:
    return sorted(p for folder in folders for p in (ROOT / folder).rglob("*.py"))


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or ""


def room_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


@pytest.mark.parametrize("path", sources("orchestrator"), ids=lambda p: str(p.relative_to(ROOT)))
def test_arrows_point_upward(path: Path) -> None:
    relative = path.relative_to(ROOT / "orchestrator")
    room = relative.parts[0].removesuffix(".py")
    if room == "__init__":
        return
    for module in imports(path):
        top = module.split(".")[0]
        assert top != "launch", f"{path} imports launch"
        assert top != "ray" or room == "ray_train", f"{path} imports ray"
        assert top not in ("matplotlib",) or room == "report", f"{path} imports a plotting library"
        if top == "orchestrator" and room_of(module):
            assert ROOMS.index(room_of(module)) <= ROOMS.index(room), f"{path} imports {module}, which lies below it"


def test_where_a_run_lies_is_settled_in_one_place() -> None:
    """Whoever joined ``run.dir`` and ``run.name`` otherwise would look elsewhere for a run in ``~``."""
    reads = {
        str(path.relative_to(ROOT))
        for path in sources("orchestrator", "launch")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and ast.unparse(node).endswith("run.dir")
    }
    refuses_or_has_refused = {"launch/submit_command.py", "launch/ray_jobs/jobs.py"}
    assert reads - refuses_or_has_refused == {"orchestrator/runtime/preparation.py"}


@pytest.mark.parametrize("path", sources("orchestrator/core"), ids=lambda p: p.name)
def test_the_core_is_pure(path: Path) -> None:
    for module in imports(path):
        top = module.split(".")[0]
        allowed = (
            top in PURE or top == "numpy" or module == "orchestrator.types" or module.startswith("orchestrator.core")
        )
        assert allowed or module == "orchestrator.registry", f"{path.name} imports {module}"
    assert "np.random" not in path.read_text()


@pytest.mark.parametrize("path", sources("orchestrator/optim"), ids=lambda p: p.name)
def test_the_optimizers_import_torch_and_nothing_else_of_the_house(path: Path) -> None:
    for module in imports(path):
        allowed = module.split(".")[0] in PURE | {"torch"} or module.startswith("orchestrator.optim")
        assert allowed, f"{path.name} imports {module}"


@pytest.mark.parametrize("path", sources("orchestrator"), ids=lambda p: str(p.relative_to(ROOT)))
def test_only_launch_reads_the_environment_and_only_runtime_reads_clocks(path: Path) -> None:
    tree = ast.parse(path.read_text())
    names = {
        f"{n.value.id}.{n.attr}"
        for n in ast.walk(tree)
        if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name)
    }
    assert not names & {"os.environ", "os.getenv"}, path
    if path.relative_to(ROOT / "orchestrator").parts[0] not in ("runtime", "ray_train"):
        assert not names & {"time.time", "time.monotonic", "time.perf_counter"}, path


def test_importing_the_package_imports_neither_ray_nor_a_plotting_library() -> None:
    code = "import sys, orchestrator; print([m for m in ('ray', 'matplotlib', 'torch') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_the_top_level_holds_what_the_design_names() -> None:
    listed = subprocess.run(["git", "ls-files"], capture_output=True, text=True, check=True, cwd=ROOT).stdout.split(
        "\n"
    )
    top = {line.split("/")[0] for line in listed if line}
    visible = {name for name in top if not name.startswith(".")}
    assert visible <= {"pyproject.toml", "README.md", "LICENSE", "orchestrator", "launch", "configs", "tests", "docker"}
