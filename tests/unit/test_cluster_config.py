"""The section ``cluster``: what it refuses and how it says so, and that pods and workers are one number."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, strategies as st
from pydantic import BaseModel

from orchestrator.config import RunConfig, load_config, to_yaml
from orchestrator.config.cluster import ClusterSection
from orchestrator.config.error_messages import model_in
from orchestrator.config.worker_pods import cluster_rules, pod_counts
from orchestrator.errors import ConfigError
from tests.clusters import TRAINS, run_configs

GOOD = """\
run: {name: Digits_v1.2}
task: {name: digits}
train: {epochs: 3}
batch: {initial: 32, micro_batch: 16, max: 512}
optimizer: {name: sgd, lr: 0.1}
workers: {initial: 3, min: 2, max: 8, gpus_per_worker: 1, cpus_per_worker: 4}
cluster:
  image: registry.example.com/team/train:1.4
  worker_groups:
  - {name: spot, capacity: spot, memory_gib: 32, node_selector: {kind: spot}, tolerations: [{key: spot}]}
  - {name: steady, memory_gib: 64, max_workers: 4, workers_per_pod: 2}
  storage: {claim: runs}
  secret_env: {WANDB_API_KEY: {secret: wandb, key: api-key}}
"""


@pytest.fixture
def good(tmp_path: Path) -> Path:
    path = tmp_path / "good.yaml"
    path.write_text(GOOD, encoding="utf-8")
    return path


GROUP = "cluster.worker_groups=[{name: a, memory_gib: 3, "


@pytest.mark.parametrize(
    ("override", "key", "words"),
    [
        ("cluster.image=train:latest", "cluster.image", "must name a version"),
        ("cluster.image=train", "cluster.image", "must name a version"),
        ("cluster.image='UPPER:1'", "cluster.image", "must be an image"),
        ("cluster.image_pull_secrets=mine", "cluster.image_pull_secrets", "image_pull_secrets: [my-registry]"),
        ("cluster.name=Digits", "cluster.name", "lower-case"),
        (f"cluster.name={'a' * 48}", "cluster.name", "at most 47"),
        (f"run.name={'a' * 48}", "cluster.name", "give cluster.name"),
        ("run.name=2nd", "cluster.name", "give cluster.name"),
        ("cluster.namespace=Team", "cluster.namespace", "kubectl get namespaces"),
        ("cluster.head.memory_gib=4", "cluster.head.memory_gib", "at least 8"),
        ("cluster.head.cpus=1", "cluster.head.cpus", "at least 2"),
        ("cluster.head.tolerations=[{key: a, effect: NoRun}]", "cluster.head.tolerations[0].effect", "NoSchedule"),
        ("cluster.worker_groups=[]", "cluster.worker_groups", "somebody must train"),
        ("cluster.worker_groups={name: a}", "cluster.worker_groups", "[{name: pods, memory_gib: 16}]"),
        (GROUP + "memory: 3}]", "cluster.worker_groups[0].memory", "cluster.worker_groups[0].memory_gib?"),
        ("cluster.worker_groups=[{name: a}]", "cluster.worker_groups[0].memory_gib", "must be given"),
        ("cluster.worker_groups=[{name: head, memory_gib: 3}]", "cluster.worker_groups[0].name", "neither head nor"),
        (GROUP + "capacity: spot}]", "cluster.worker_groups[0].node_selector", "gke-spot"),
        (GROUP + "tolerations: spot}]", "cluster.worker_groups[0].tolerations", "tolerations: [{key: spot}]"),
        (GROUP + "node_selector: {a b: c}}]", "cluster.worker_groups[0].node_selector", "after a domain"),
        (GROUP + "node_selector: {a: b c}}]", "cluster.worker_groups[0].node_selector", "a label's value"),
        (GROUP + "gpu_resource: gpu}]", "cluster.worker_groups[0].gpu_resource", "domain/name"),
        (GROUP + "cpus: 3}]", "cluster.worker_groups[0].cpus", "write 4 or more"),
        (GROUP + "max_workers: 9}]", "cluster.worker_groups[0].max_workers", "write 8 or less"),
        (GROUP + "max_workers: 7}]", "cluster.worker_groups", "write workers.max: 7"),
        (GROUP + "workers_per_pod: 3}]", "cluster.worker_groups[0].workers_per_pod", "workers_per_pod: 2, or"),
        (
            "cluster.worker_groups=[{name: a, memory_gib: 3}, {name: a, memory_gib: 3}]",
            "cluster.worker_groups[1].name",
            "write a-2",
        ),
        ("workers.gpus_per_worker=0.5", "cluster.worker_groups[0].workers_per_pod", "whole ones"),
        ("workers.cpus_per_worker=0.25", "cluster.worker_groups[0].workers_per_pod", "x workers.cpus_per_worker is"),
        ("cluster.kueue={queue: team}", "cluster.worker_groups", "cluster.kueue.elastic: true"),
        ("cluster.kueue={elastic: true}", "cluster.kueue.queue", "must be given"),
        ("cluster.storage={}", "cluster.storage.claim", "no place for the run's folder"),
        ("cluster.storage=null", "cluster.storage", "object_path"),
        ("cluster.storage={claim: a, object_path: 's3://bucket/a'}", "cluster.storage.object_path", "keep one"),
        ("cluster.storage={claim: a, storage_class: b}", "cluster.storage.storage_class", "only a new claim"),
        ("cluster.storage={object_path: 'http://host/x'}", "cluster.storage.object_path", "s3://bucket/folder"),
        ("cluster.storage={claim: a, mount_path: runs}", "cluster.storage.mount_path", "/mnt/groundswell"),
        ("cluster.storage={claim: a, mount_path: /etc/x}", "cluster.storage.mount_path", "/mnt/groundswell"),
        ("cluster.service_account={name: a, annotations: {b: c}}", "cluster.service_account.annotations", "create: "),
        ("cluster.env={HF_TOKEN: abc}", "cluster.env.HF_TOKEN", "secret_env: {HF_TOKEN: {secret"),
        ("cluster.env={DB: 'postgres://me:abc@host'}", "cluster.env.DB", "reads like a secret"),
        ("cluster.env={MODE: 1}", "cluster.env.MODE", "must be text"),
        ("cluster.env={1A: x}", "cluster.env", "not a digit first"),
        ("cluster.env={WANDB_API_KEY: x}", "cluster.env.WANDB_API_KEY", "not shown"),
        ("cluster.env={RAY_ADDRESS: x}", "cluster.env.RAY_ADDRESS", "remove it"),
        ("cluster.secret_env={A: {secret: b}}", "cluster.secret_env.A.key", "must be given"),
        ("cluster.labels={ray.io/x: y}", "cluster.labels", "rename it"),
        ("cluster.ttl_s=2147483648", "cluster.ttl_s", "at most 2147483647"),
        ("cluster.ttl_s=10 min", "cluster.ttl_s", "write 600,"),
        ("cluster.imge=x:1", "cluster.imge", "did you mean cluster.image?"),
    ],
    ids=lambda text: text[:60],
)
def test_a_broken_section_is_refused_by_the_name_of_its_key(good: Path, override: str, key: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(good, [override])
    said = {problem.key: str(problem) for problem in caught.value.problems}  # type: ignore[union-attr]
    assert key in said, said
    assert words in said[key]
    assert "abc" not in said[key].replace(override, "")  # no secret is repeated, beyond what was typed as --set


@pytest.mark.parametrize(
    "name", ["HF_TOKEN", "API_KEY", "MY_SECRET_2", "dbPassword", "AWS_SECRET_ACCESS_KEY", "key", "CREDENTIALS"]
)
def test_variables_that_read_like_secrets_are_refused(good: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="reads like a secret"):
        load_config(good, [f"cluster.env={{{name}: x}}"])


@pytest.mark.parametrize("name", ["TOKENIZERS_PARALLELISM", "MAX_TOKENS", "KEYBOARD", "HF_TOKEN_PATH", "NCCL_DEBUG"])
def test_variables_that_only_resemble_them_are_not(good: Path, name: str) -> None:
    cluster = load_config(good, [f"cluster.env={{{name}: x}}"]).cluster
    assert cluster is not None
    assert cluster.env == {name: "x"}


def test_a_run_without_a_cluster_needs_none(good: Path) -> None:
    assert load_config(good, ["cluster=null", "workers.cpus_per_worker=0.1"]).cluster is None


def test_the_section_reads_back_equal_with_and_without_comments(good: Path) -> None:
    config = load_config(good, ["cluster.kueue={queue: q, elastic: true}", "cluster.pod_monitor={}"])
    for comments in (True, False):
        copy = good.with_name("copy.yaml")
        copy.write_text(to_yaml(config, comments=comments), encoding="utf-8")
        assert load_config(copy) == config


def test_every_key_at_any_depth_is_described_with_its_unit() -> None:
    def sections(model: type[BaseModel]) -> list[type[BaseModel]]:
        inner = [found for field in model.model_fields.values() if (found := model_in(field.annotation))]
        return [model, *(deeper for found in inner for deeper in sections(found))]

    for model in sections(ClusterSection):
        for key, field in model.model_fields.items():
            assert re.match(r"\[[a-zA-Z ]+\] \S.{8,}", field.description or ""), f"{model.__name__}.{key}"
            if key.endswith("_s"):
                assert (field.description or "").startswith("[s]")
            if key.endswith("_gib"):
                assert (field.description or "").startswith("[GiB]")


def test_the_fewest_workers_stand_on_demand_and_the_rest_in_the_order_of_the_groups(good: Path) -> None:
    config = load_config(good)
    assert config.cluster is not None
    counts = [
        (count.group.name, count.min, count.initial, count.max) for count in pod_counts(config.cluster, config.workers)
    ]
    assert counts == [("spot", 0, 1, 8), ("steady", 1, 1, 2)]


@given(data=run_configs())
def test_pods_hold_just_the_workers_that_the_run_may_have(data: dict[str, Any]) -> None:
    config = RunConfig.model_validate(data)
    assert config.cluster is not None
    counts, workers = pod_counts(config.cluster, config.workers), config.workers

    def held(which: str) -> int:
        return sum(getattr(count, which) * count.group.workers_per_pod for count in counts)

    largest_pod = max(count.group.workers_per_pod for count in counts)
    assert all(0 <= count.min <= count.initial <= count.max for count in counts)
    assert held("max") >= workers.max
    for count in counts:
        most = workers.max if count.group.max_workers is None else count.group.max_workers
        assert count.max * count.group.workers_per_pod == most
    if config.cluster.kueue is not None and not config.cluster.kueue.elastic:
        assert held("min") == held("initial") == held("max") == workers.max
    else:
        assert workers.min <= held("min") < workers.min + largest_pod
        assert workers.initial <= held("initial") < workers.initial + 2 * largest_pod


@given(
    workers=st.fixed_dictionaries(
        {"max": st.integers(1, 12), "cpus_per_worker": st.sampled_from([0.5, 1.0, 1.5, 4.0])}
    ),
    each=st.integers(1, 4),
    most=st.none() | st.integers(1, 12),
)
def test_one_group_is_accepted_just_where_its_pods_come_out_even(
    workers: dict[str, Any], each: int, most: int | None
) -> None:
    group = {"name": "a", "memory_gib": 1, "workers_per_pod": each, "max_workers": most}
    cluster = ClusterSection.model_validate({"image": "a:1", "worker_groups": [group], "storage": {"claim": "a"}})
    broken = cluster_rules(cluster, RunConfig.model_validate({**TRAINS, "workers": workers}).workers, "a")
    room = workers["max"] if most is None else most
    even = room % each == 0 and room == workers["max"] and (each * workers["cpus_per_worker"]).is_integer()
    assert (not broken) == even
