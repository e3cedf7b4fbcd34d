"""What Prometheus reads of a real run over HTTP is what dashboard and README speak of, and what the run wrote."""

from __future__ import annotations

import json
import re
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from itertools import combinations
from pathlib import Path
from typing import Any

import promql_parser
import pytest

from orchestrator.runtime import folder
from orchestrator.types import Verdict
from tests.ray.test_exactly_once import kill_at
from tests.support import config

ROOT = Path(__file__).resolve().parents[2]
DASHBOARD = json.loads((ROOT / "docker" / "grafana" / "groundswell.json").read_text())
README = (ROOT / "README.md").read_text()
LINE = re.compile(r"(ray_groundswell_\w+)\{(.*)\} (\S+)")
SAMPLES = 1_000_000  # more than it takes: the run is stopped

Labels = dict[str, str]


class Scraper:
    """Reads an endpoint again and again while a run is on."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}/metrics"
        self.seen: list[tuple[float, str, Labels, float]] = []  # time, name, labels, value
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self._over.wait(0.3):
            with suppress(OSError):  # a busy machine; the next one comes soon
                self.seen += self.read()

    def read(self) -> list[tuple[float, str, Labels, float]]:
        with urllib.request.urlopen(self.url, timeout=10) as answer:
            found = LINE.findall(answer.read().decode())
        now = time.time()
        return [
            (now, name, dict(re.findall(r'(\w+)="([^"]*)"', labels)), float(value)) for name, labels, value in found
        ]

    def __enter__(self) -> Scraper:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def values(self, name: str, **labels: str) -> list[float]:
        return [value for _, n, found, value in self.seen if n == name and labels.items() <= found.items()]

    def total(self, name: str) -> float:
        """Of a counter, over the processes that have counted."""
        workers = {labels["WorkerId"] for _, n, labels, _ in self.seen if n == name}
        return sum(max(self.values(name, WorkerId=worker)) for worker in workers)


@pytest.fixture(scope="module")
def scraped(cluster: None, metrics_port: int, tmp_path_factory: pytest.TempPathFactory) -> tuple[Scraper, Path]:
    """A run with growth, a resize, a worker that is killed, a checkpoint and, told by hand, a budget."""
    import ray

    from orchestrator.ray_train.trainer import AdaptiveTrainer

    path = tmp_path_factory.mktemp("metrics")
    pids = path / "pids"
    pids.mkdir()
    options = {"size": 400, "step_s": 0.04, "pids": str(pids), "slow_save_s": 0.0}
    settings = config(
        path,
        run={"name": "swell"},
        task={"name": "tests.ray.tasks:slow", "options": options},
        train={"samples": SAMPLES},
        batch={"initial": 16, "micro_batch": 4, "max": 64},
        optimizer={"lr": 0.001},  # so slow that the noise scale is soon measured
        controller={"policy": "schedule", "ramp": [[100, 32]], "every_samples": 40, "confidence": 0.5},
        workers={"initial": 1, "max": 2, "micro_batches_each": 4, "when": "always"},
        checkpoint={"every_samples": 100},
    )
    run = path / "swell"

    def disturb(scraper: Scraper) -> None:
        kill_at(run, pids, samples=620, rank=0, world_size=2).join()
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not (
            any(row["kind"] == "fault" for row in folder.rows(run / folder.EVENTS))
            # Where the machine is busy, Ray hands a count on late, and forgets what a process has not handed on.
            and scraper.values("ray_groundswell_faults_total")
        ):
            time.sleep(0.05)
        time.sleep(5.0)  # of training, for gauges to be read
        (run / folder.STOP_REQUEST).touch()

    with Scraper(metrics_port) as scraper:
        disturber = threading.Thread(target=disturb, args=(scraper,))
        disturber.start()
        AdaptiveTrainer(settings).fit()
        disturber.join()
        ray.get(ray.remote(_spend).remote(settings))
        deadline = time.monotonic() + 20
        while scraper.values("ray_groundswell_budget_left_worker_hours") == [] and time.monotonic() < deadline:
            time.sleep(0.3)
    return scraper, run


def _spend(settings: Any) -> None:
    """In a process of the cluster: what a run with a budget says."""
    from orchestrator.ray_train.metrics import RunMetrics

    metrics = RunMetrics(settings)
    metrics.event({"kind": "budget", "time": 0.0, "used_worker_hours": 1.5, "left_worker_hours": 0.5})
    time.sleep(2.5)
    metrics.close()


def queries() -> Iterator[str]:
    for panel in DASHBOARD["panels"]:
        for target in panel["targets"]:
            yield target["expr"]


def names_in(expression: str) -> set[str]:
    """The metrics that a query reads, by a parser of Prometheus' language."""
    found: set[str] = set()

    def walk(node: Any) -> None:
        if isinstance(node, promql_parser.VectorSelector):
            found.add(node.name)
        elif isinstance(node, promql_parser.MatrixSelector):
            walk(node.vector_selector)
        elif isinstance(node, promql_parser.BinaryExpr):
            walk(node.lhs)
            walk(node.rhs)
        elif isinstance(node, promql_parser.Call):
            for argument in node.args:
                walk(argument)
        elif not isinstance(node, (promql_parser.NumberLiteral, promql_parser.StringLiteral)):
            walk(node.expr)  # aggregations, parentheses, signs

    walk(promql_parser.parse(expression.replace("$__rate_interval", "1m")))
    return found


def of_the_dashboard() -> set[str]:
    return set().union(*map(names_in, queries()))


@pytest.mark.ray
def test_the_dashboard_names_what_a_real_run_exports_and_nothing_exported_is_forgotten(
    scraped: tuple[Scraper, Path],
) -> None:
    exported = {name for _, name, _, _ in scraped[0].seen}
    assert of_the_dashboard() <= exported
    from orchestrator.ray_train.metrics import exported_names

    assert exported == set(exported_names())
    listed = set(re.findall(r"`(ray_groundswell_\w+)`", README))
    assert exported == listed
    assert {labels["run"] for _, _, labels, _ in scraped[0].seen} == {"swell"}


@pytest.mark.ray
def test_the_values_are_those_of_the_runs_folder(scraped: tuple[Scraper, Path]) -> None:
    scraper, run = scraped
    rows = list(folder.rows(run / folder.METRICS))
    events = list(folder.rows(run / folder.EVENTS))
    for name, key in (
        ("global_batch_samples", "global_batch"),
        ("accumulation_steps", "accum_steps"),
        ("micro_batch_samples", "micro_batch"),
        ("learning_rate", "lr"),
        ("loss", "loss"),
        ("noise_scale_samples", "noise_scale"),
        ("noise_scale_low_samples", "noise_low"),
        ("noise_scale_high_samples", "noise_high"),
        ("throughput_samples_per_second", "samples_per_s"),
        ("samples_seen", "samples_seen"),
    ):
        found = set(scraper.values(f"ray_groundswell_{name}"))
        assert found, name
        assert found <= {row[key] for row in rows if row[key] is not None}, name
    worth = {
        (row["noise_scale"] + 16) / (row["noise_scale"] + row["global_batch"]) for row in rows if row["noise_scale"]
    }
    assert set(scraper.values("ray_groundswell_statistical_efficiency_ratio")) <= worth
    assert set(scraper.values("ray_groundswell_samples_planned")) == {SAMPLES}
    assert set(scraper.values("ray_groundswell_workers_present")) >= {1.0, 2.0}
    assert set(scraper.values("ray_groundswell_workers_wanted")) == {1.0, 2.0}
    saved = {event["time"] for event in events if event["kind"] == "checkpoint"}
    assert set(scraper.values("ray_groundswell_checkpoint_timestamp_seconds")) <= saved
    for verdict in Verdict:
        assert set(scraper.values("ray_groundswell_verdict", verdict=verdict.value)) <= {0.0, 1.0}
    costs = [event["cost_s"] for event in events if event["kind"] == "resize"]
    assert len(costs) >= 2  # grown, and gone on without the one that was killed
    assert scraper.total("ray_groundswell_resizes_total") == len(costs)
    assert scraper.total("ray_groundswell_resize_pause_seconds_total") == pytest.approx(sum(costs))
    assert scraper.total("ray_groundswell_faults_total") == 1
    grown = {labels["outcome"]: value for _, name, labels, value in scraper.seen if "decisions" in name}
    assert grown["grow"] == 1


@pytest.mark.ray
def test_gauges_of_workers_that_are_gone_go_and_are_one_series_at_a_time(scraped: tuple[Scraper, Path]) -> None:
    scraper, _ = scraped
    by_worker: dict[str, list[float]] = {}
    for at, name, labels, _ in scraper.seen:
        if name == "ray_groundswell_samples_seen":
            by_worker.setdefault(labels["WorkerId"], []).append(at)
    assert len(by_worker) == 2  # rank zero before the kill, and after
    spans = sorted((min(times), max(times)) for times in by_worker.values())
    # Each is gone two report intervals, of 1 s here, after its last word.
    assert all(later[0] > earlier[1] - 3.0 for earlier, later in combinations(spans, 2))
    deadline = time.monotonic() + 20
    while any(not name.endswith("_total") for _, name, _, _ in scraper.read()):
        assert time.monotonic() < deadline
        time.sleep(0.3)


def test_every_query_is_for_the_runs_that_were_chosen() -> None:
    for expression in queries():
        assert expression.count("ray_groundswell_") == expression.count('{run=~"$run"}')
    (of_runs,) = (v for v in DASHBOARD["templating"]["list"] if v["name"] == "run")
    (named,) = re.findall(r"ray_groundswell_\w+", of_runs["definition"])
    assert named in of_the_dashboard()
    assert f"label_values({named}, run)" == of_runs["definition"] == of_runs["query"]["query"]


def test_the_dashboard_is_one_that_grafana_takes() -> None:
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert len({panel["title"] for panel in panels}) == len(panels)
    source = {"type": "prometheus", "uid": "${datasource}"}
    assert "datasource" in {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    for panel in panels:
        assert panel["datasource"] == source
        assert panel["description"]
        assert [target["refId"] for target in panel["targets"]] == list("ABCDEFG"[: len(panel["targets"])])
        assert all(target["datasource"] == source for target in panel["targets"])
        assert 0 <= panel["gridPos"]["x"] <= 24 - panel["gridPos"]["w"]
    for one, other in combinations((panel["gridPos"] for panel in panels), 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        assert beside or one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
    (noise,) = (panel for panel in panels if panel["title"] == "Noise scale and batch")
    assert noise["fieldConfig"]["defaults"]["custom"]["scaleDistribution"]["type"] == "log"
