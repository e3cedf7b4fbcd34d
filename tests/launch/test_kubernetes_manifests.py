"""``groundswell k8s render``: what is written is what KubeRay takes, and what an expert expects."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from hypothesis import given, settings, strategies as st

from launch.bundled import find_config, read_config
from launch.cli import main
from launch.kubernetes.distil import FILE, as_text, distil
from launch.kubernetes.manifests import entrypoint, render
from launch.kubernetes.reasons import all_reasons, reason
from launch.kubernetes.validation import check
from launch.kubernetes.yaml_text import dump, load
from orchestrator.config import RunConfig, load_config
from orchestrator.config.worker_pods import pod_counts
from orchestrator.runtime.preparation import run_url
from tests.clusters import REALISTIC, realistic, run_configs

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden"
KUBERAY = ROOT.parent / "shared" / "kuberay"


def manifests(name: str, kind: Any = "RayJob") -> dict[str, Any]:
    config = RunConfig.model_validate(realistic(name))
    return {document["kind"]: document for document in render(config, kind=kind)}


def job_spec(name: str) -> Any:
    return manifests(name)["RayJob"]["spec"]


@pytest.mark.parametrize("kind", ["RayJob", "RayCluster"])
@pytest.mark.parametrize("name", REALISTIC)
def test_five_realistic_clusters_pass_the_schema_and_the_operators_rules(name: str, kind: Any) -> None:
    config = RunConfig.model_validate(realistic(name))
    report = check(dump(render(config, kind=kind)), name)
    assert not report.problems, "\n".join(map(str, report.problems))
    assert any(each.startswith(kind) for each in report.checked)
    assert not report.unknown


@settings(max_examples=30, deadline=None)
@given(data=run_configs(), kind=st.sampled_from(["RayJob", "RayCluster"]))
def test_all_that_the_config_accepts_renders_to_what_validates_and_reads_back(data: dict[str, Any], kind: Any) -> None:
    config = RunConfig.model_validate(data)
    documents = render(config, kind=kind)
    text = dump(documents)
    report = check(text, "drawn")
    assert not report.problems, "\n".join(map(str, report.problems))
    assert [document.data for document in load(text)] == documents
    assert render(RunConfig.model_validate(data), kind=kind) == documents


@settings(max_examples=60, deadline=None)
@given(data=run_configs())
def test_what_the_cluster_may_give_is_what_the_controller_may_ask_for(data: dict[str, Any]) -> None:
    config = RunConfig.model_validate(data)
    assert config.cluster is not None
    (job,) = [document for document in render(config) if document["kind"] == "RayJob"]
    workers, room = config.workers, 0
    for count, group in zip(
        pod_counts(config.cluster, workers), job["spec"]["rayClusterSpec"]["workerGroupSpecs"], strict=True
    ):
        assert (count.min, count.initial, count.max) == (group["minReplicas"], group["replicas"], group["maxReplicas"])
        announced = {key: int(value) for key, value in group["rayStartParams"].items()}
        # Ray puts as many workers into a pod as both resources hold.
        fit = announced["num-cpus"] // workers.cpus_per_worker
        if workers.gpus_per_worker:
            fit = min(fit, announced["num-gpus"] // workers.gpus_per_worker)
        assert fit == count.group.workers_per_pod
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        assert int(limits["cpu"]) >= announced["num-cpus"]
        assert int(limits.get(count.group.gpu_resource, 0)) == announced["num-gpus"]
        room += group["maxReplicas"] * int(fit)
    assert room >= workers.max
    if len(config.cluster.worker_groups) == 1:
        assert room == workers.max


@pytest.mark.parametrize("name", REALISTIC)
def test_the_explained_manifests_are_those_that_were_reviewed(name: str) -> None:
    """``REWRITE_GOLDEN=1`` writes them anew, for a review; the run's config and Ray's version are left out."""
    found = manifests(name)
    found["ConfigMap"]["data"] = {"config.yaml": "(the resolved config)"}
    found["RayJob"]["spec"]["rayClusterSpec"]["rayVersion"] = "(the installed one)"
    written = dump(list(found.values()), reason)
    path = GOLDEN / f"kubernetes_{name}.yaml"
    if os.environ.get("REWRITE_GOLDEN"):
        path.write_text(written, encoding="utf-8")
    assert written == path.read_text(encoding="utf-8")


def test_comments_change_nothing_and_every_reason_is_given_somewhere() -> None:
    said = ""
    for name in REALISTIC:
        config = RunConfig.model_validate(realistic(name))
        for kind in ("RayJob", "RayCluster"):
            documents = render(config, kind=kind)  # type: ignore[arg-type]
            text = dump(documents, reason)
            assert list(yaml.safe_load_all(text)) == documents
            said += " ".join(line.strip().removeprefix("# ") for line in text.splitlines()) + " "
    assert [why for why in all_reasons() if why not in said] == []


def test_the_shipped_schema_is_that_of_the_published_definitions() -> None:
    if not KUBERAY.is_dir():
        pytest.skip(f"{KUBERAY} is not there: the published definitions lie beside the checkout in CI")
    assert as_text(distil(KUBERAY)) == FILE.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", REALISTIC)
def test_a_job_lives_and_ends_as_it_should(name: str) -> None:
    spec = job_spec(name)
    assert spec["submissionMode"] == "K8sJobMode"
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["ttlSecondsAfterFinished"] == 600
    assert spec["entrypointNumCpus"] == 0
    assert spec["backoffLimit"] == 2
    assert "deletionStrategy" not in spec
    assert yaml.safe_load(spec["runtimeEnvYAML"]) == {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "100"}}
    assert spec["rayClusterSpec"]["authOptions"] == {"mode": "token"}
    assert spec["entrypoint"].startswith("groundswell run /etc/groundswell/config.yaml --auto-resume --address auto ")


@pytest.mark.parametrize("name", REALISTIC)
def test_the_head_trains_nothing_and_stays_where_it_is(name: str) -> None:
    head = job_spec(name)["rayClusterSpec"]["headGroupSpec"]
    assert head["rayStartParams"] == {"num-cpus": "0", "num-gpus": "0"}
    annotations = head["template"]["metadata"]["annotations"]
    assert annotations["cluster-autoscaler.kubernetes.io/safe-to-evict"] == "false"
    resources = head["template"]["spec"]["containers"][0]["resources"]
    assert resources["requests"] == resources["limits"] == {"cpu": "2", "memory": "8Gi"}


@pytest.mark.parametrize("name", REALISTIC)
def test_every_pod_is_restricted_and_ray_pods_have_time_to_save(name: str) -> None:
    spec = job_spec(name)
    cluster = spec["rayClusterSpec"]
    ray_pods = [group["template"]["spec"] for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]]
    for pod in [*ray_pods, spec["submitterPodTemplate"]["spec"]]:
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] == pod["securityContext"]["fsGroup"] == 1000
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        (container,) = pod["containers"]
        restricted = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        assert container["securityContext"] == restricted
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert pod["restartPolicy"] == "Never"
    for pod in ray_pods:
        (drain,) = [v for v in pod["containers"][0]["env"] if v["name"] == "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"]
        assert float(drain["value"]) == 100
        assert pod["terminationGracePeriodSeconds"] == 120
        assert "lifecycle" not in pod["containers"][0]


def test_the_installed_ray_is_the_one_that_is_named() -> None:
    import ray

    assert job_spec("cpu_only")["rayClusterSpec"]["rayVersion"] == ray.__version__


def test_the_config_travels_with_the_job_and_reads_back_equal(tmp_path: Path) -> None:
    for name in REALISTIC:
        path = tmp_path / "config.yaml"
        path.write_text(manifests(name)["ConfigMap"]["data"]["config.yaml"], encoding="utf-8")
        assert load_config(path) == RunConfig.model_validate(realistic(name))
        head = job_spec(name)["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
        assert {"name": "config", "configMap": {"name": manifests(name)["ConfigMap"]["metadata"]["name"]}} in head[
            "volumes"
        ]


def test_spot_groups_come_first_and_all_other_pods_stay_off_their_nodes() -> None:
    cluster = job_spec("spot_plus_on_demand")["rayClusterSpec"]
    spot, steady = cluster["workerGroupSpecs"]
    assert (spot["priority"], steady["priority"]) == (2, 1)
    assert (spot["minReplicas"], spot["replicas"], spot["maxReplicas"]) == (0, 0, 3)
    assert (steady["minReplicas"], steady["replicas"], steady["maxReplicas"]) == (1, 1, 2)
    for group in (cluster["headGroupSpec"], steady):
        (only,) = group["template"]["spec"]["affinity"]["nodeAffinity"].values()
        lacking = [term["matchExpressions"][0]["key"] for term in only["nodeSelectorTerms"]]
        assert lacking == ["eks.amazonaws.com/capacityType", "team.example/gpu"]
    assert "affinity" not in spot["template"]["spec"]


def test_a_queue_of_kueue_gets_all_pods_at_once_unless_it_is_elastic() -> None:
    job = manifests("kueue")["RayJob"]
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team-queue"
    assert job["spec"]["suspend"] is True
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["enableInTreeAutoscaling"] is False
    assert "autoscalerOptions" not in cluster
    (group,) = cluster["workerGroupSpecs"]
    assert group["minReplicas"] == group["replicas"] == group["maxReplicas"] == 4
    elastic = manifests("object_storage")["RayJob"]
    assert elastic["metadata"]["annotations"]["kueue.x-k8s.io/elastic-job"] == "true"
    assert elastic["spec"]["rayClusterSpec"]["enableInTreeAutoscaling"] is True


def test_an_object_store_needs_no_volume_and_no_secret() -> None:
    found = manifests("object_storage")
    assert "PersistentVolumeClaim" not in found
    assert "persistentVolumeClaim" not in dump(list(found.values()))
    assert found["ServiceAccount"]["metadata"]["annotations"]["eks.amazonaws.com/role-arn"].startswith("arn:")
    assert found["RayJob"]["spec"]["entrypoint"].endswith("--run-dir s3://team-bucket/runs")


def test_a_cluster_that_stands_holds_no_training_pods_until_a_run_asks() -> None:
    found = manifests("spot_plus_on_demand", "RayCluster")
    assert "ConfigMap" not in found
    assert "RayJob" not in found
    groups = found["RayCluster"]["spec"]["workerGroupSpecs"]
    assert [(g["minReplicas"], g["replicas"], g["maxReplicas"]) for g in groups] == [(0, 0, 3), (0, 0, 2)]


def test_secrets_are_references_in_every_pod_that_trains() -> None:
    cluster = job_spec("one_gpu_group")["rayClusterSpec"]
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        env = {variable["name"]: variable for variable in group["template"]["spec"]["containers"][0]["env"]}
        assert env["WANDB_API_KEY"] == {
            "name": "WANDB_API_KEY",
            "valueFrom": {"secretKeyRef": {"name": "wandb", "key": "api-key"}},
        }


@pytest.mark.parametrize(
    "text", ["a\nb", "a\n\n", " a\nb ", "a\u2028b\nc", "a\x85b", "\tx\ny", "a\r\nb", "#\n: x", "\U0001f600"]
)
def test_text_of_several_lines_reads_back_equal(text: str) -> None:
    assert load(dump([{"kind": "X", "value": [text, {"a": text}]}]))[0].data["value"] == [text, {"a": text}]


@pytest.mark.parametrize(
    "word", ["yes", "on", "1e3", "0o17", "012", "1_000", "null", "~", "2024-01-01", "1:30", ".5", ""]
)
def test_text_stays_text_for_every_reader_of_yaml(word: str) -> None:
    text = dump([{"kind": "X", "value": word}])
    quoted = text.splitlines()[1].removeprefix("value: ")
    assert yaml.safe_load(text)["value"] == word
    if word not in ("2024-01-01", "1:30"):
        assert quoted == f'"{word}"'


def test_the_bundled_example_is_the_main_job_and_runs_anywhere() -> None:
    example, digits = load_config(find_config("digits_on_kubernetes")), load_config(find_config("digits"))
    for section in ("task", "train", "batch", "optimizer", "schedule", "controller", "checkpoint"):
        assert getattr(example, section) == getattr(digits, section)
    assert "/mnt/groundswell" in entrypoint(example)


def call(*arguments: str) -> Any:
    return CliRunner().invoke(main, ["k8s", *arguments])


def test_render_writes_to_the_terminal_or_into_numbered_files(tmp_path: Path) -> None:
    shown = call("render", "digits_on_kubernetes", "--explain")
    assert shown.exit_code == 0
    assert "# After a failure the job goes on" in shown.stdout
    done = call("render", "digits_on_kubernetes", "-o", str(tmp_path / "out"))
    assert done.exit_code == 0
    names = ["1-persistentvolumeclaim.yaml", "2-configmap.yaml", "3-rayjob.yaml"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    whole = list(yaml.safe_load_all(shown.stdout))
    assert [yaml.safe_load((tmp_path / "out" / name).read_text()) for name in names] == whole
    assert "#" not in (tmp_path / "out" / names[2]).read_text()
    again = call("validate", str(tmp_path / "out"), "digits_on_kubernetes")
    assert again.exit_code == 0, again.stderr
    assert again.stdout.count("OK ") == 4


def test_render_without_a_cluster_says_what_to_give() -> None:
    done = call("render", "digits")
    assert done.exit_code == 2
    assert "cluster:" in done.stderr
    assert "groundswell config show digits_on_kubernetes" in done.stderr


def test_overrides_reach_the_manifests() -> None:
    done = call("render", "digits_on_kubernetes", "--set", "cluster.name=mine", "--set", "cluster.ttl_s=7")
    assert "ttlSecondsAfterFinished: 7" in done.stdout
    assert "name: mine-config" in done.stdout


def test_a_run_in_an_object_store_is_kept_where_the_manifests_say() -> None:
    override = "cluster.storage={object_path: 's3://bucket/runs'}"
    for command in ("render", "validate"):
        done = call(command, "digits_on_kubernetes", "--set", override)
        assert (done.exit_code, done.stderr) == (0, "")
    words = entrypoint(load_config(find_config("digits_on_kubernetes"), [override])).split()
    (run_dir,) = words[words.index("--run-dir") + 1 :]
    config = read_config("digits_on_kubernetes", [override], run_dir=run_dir)
    assert run_url(config) == f"s3://bucket/runs/{config.run.name}"


def readme_block(language: str, beginning: str) -> str:
    found = re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.S)
    (block,) = [each for each in found if beginning in each]
    return str(block)


def test_the_readmes_commands_exist() -> None:
    lines = readme_block("bash", "groundswell k8s").splitlines()
    assert {line.split()[2] for line in lines} == {"render", "validate", "apply", "status", "logs", "delete"}
    for line in lines:
        words = line.split("#")[0].split()
        shown = call(words[2], "--help")
        assert shown.exit_code == 0
        assert all(word in shown.output for word in words if word.startswith("-"))


def test_the_readmes_config_renders_to_what_it_says(tmp_path: Path) -> None:
    path = tmp_path / "example.yaml"
    path.write_text(readme_block("yaml", "cluster:"), encoding="utf-8")
    assert call("validate", str(path)).exit_code == 0
    (job,) = [each for each in render(load_config(path)) if each["kind"] == "RayJob"]
    groups = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    sizes = [(group["minReplicas"], group["replicas"], group["maxReplicas"]) for group in groups]
    assert sizes == [(0, 0, 3), (1, 1, 1)]
