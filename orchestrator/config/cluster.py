"""On which Kubernetes cluster does a run compute: its image, its pods, and where it keeps its files?

The section is optional, and nothing but ``groundswell k8s`` reads it: the same file runs on a laptop. How many workers
there are is said once, in ``workers``; here stands only how they are put into pods.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from orchestrator.config.kubernetes_names import (
    VARIABLE_NAMES,
    Annotations,
    GroupName,
    Image,
    JobName,
    LabelKey,
    Labels,
    LabelValue,
    MountPath,
    Namespace,
    ObjectName,
    ObjectPath,
    ResourceName,
    SecretKey,
)
from orchestrator.config.section import Broken, Section, refuse

# Variables that the manifests set, or that KubeRay does.
OWN_VARIABLES = ("RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", "RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN")
_MOST = 2**31 - 1  # Kubernetes keeps these numbers in 32 bits
_OWN_DOMAINS = ("ray.io/", "kueue.x-k8s.io/", "app.kubernetes.io/")

_SECRET_NAME = re.compile(
    r"PASSWORD|PASSWD|SECRET|CREDENTIAL|APIKEY|(^|_)(TOKEN|KEY|PASS|PWD)(_|$)", flags=re.IGNORECASE
)
_NAMES_A_PLACE = re.compile(r"_(PATH|FILE|DIR)$", flags=re.IGNORECASE)
_PASSWORD_IN_ADDRESS = re.compile(r"://[^/@\s]*:[^/@\s]+@")


class TolerationSection(Section):
    """A taint of nodes that pods may run on all the same."""

    key: LabelKey = Field(description="[name] the taint's key")
    value: LabelValue | None = Field(default=None, description="[text] the taint's value; null: any")
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] = Field(
        default="NoSchedule", description="[name] the taint's effect"
    )


NodeSelector = Annotated[Labels, Field(description="[labels] only on nodes with these labels")]
Tolerations = Annotated[
    tuple[TolerationSection, ...],
    Field(strict=False, description="[list of taints] also on nodes with these taints: key, value, effect"),
]
PriorityClass = Annotated[
    ObjectName | None, Field(description="[name] the PriorityClass of the pods; null: the cluster's default")
]


class HeadSection(Section):
    """The pod that holds Ray's own services and the controller; it trains nothing."""

    cpus: int = Field(default=2, ge=2, description="[CPU cores] of the head's pod, which needs two")
    memory_gib: int = Field(default=8, ge=8, description="[GiB] memory of the head's pod, which needs eight")
    node_selector: NodeSelector = Field(default_factory=dict)
    tolerations: Tolerations = ()
    priority_class: PriorityClass = None


class WorkerGroupSection(Section):
    """Pods of one kind; groups are asked for in the order in which they are listed."""

    name: GroupName = Field(description="[name] of the group, part of its pods' names")
    capacity: Literal["on_demand", "spot"] = Field(
        default="on_demand", description="[name] on_demand, or spot: nodes that the provider may take back at any time"
    )
    workers_per_pod: int = Field(
        default=1, ge=1, description="[workers] in each pod, which has the CPU cores and GPUs of all of them"
    )
    max_workers: int | None = Field(
        default=None, ge=1, le=_MOST, description="[workers] the most in the pods of this group; null: workers.max"
    )
    cpus: int | None = Field(
        default=None, ge=1, description="[CPU cores] of a pod; null: just what its workers reserve"
    )
    memory_gib: int = Field(ge=1, description="[GiB] memory of a pod, reserved and the most that it may use")
    gpu_resource: ResourceName = Field(
        default="nvidia.com/gpu", description="[name] how nodes announce the GPUs of workers.gpus_per_worker"
    )
    node_selector: NodeSelector = Field(default_factory=dict)
    tolerations: Tolerations = ()
    priority_class: PriorityClass = None

    @model_validator(mode="after")
    def _rules(self) -> WorkerGroupSection:
        if self.capacity == "spot" and not self.node_selector:
            rule = "spot nodes are known by their labels, and none is given"
            fix = 'such as {cloud.google.com/gke-spot: "true"}, {eks.amazonaws.com/capacityType: SPOT} or '
            fix += "{karpenter.sh/capacity-type: spot}"
            refuse([Broken(keys=("node_selector", "capacity"), value={}, rule=rule, fix=fix)])
        return self


class StorageSection(Section):
    """Where the run's folder lies: a volume that is there, a new one, or an object store."""

    claim: ObjectName | None = Field(
        default=None, description="[name] a PersistentVolumeClaim that is there and that many nodes mount at once"
    )
    size_gib: int | None = Field(
        default=None, ge=1, description="[GiB] a new claim of this size is made, and outlives the job"
    )
    storage_class: ObjectName | None = Field(
        default=None, description="[name] of a new claim, with ReadWriteMany; null: the cluster's default"
    )
    object_path: ObjectPath | None = Field(
        default=None, description="[path] s3://bucket/folder or gs://bucket/folder, by the service account's rights"
    )
    mount_path: MountPath = Field(
        default="/mnt/groundswell", description="[path] where pods see the volume; the run's folder is made in it"
    )

    @model_validator(mode="after")
    def _rules(self) -> StorageSection:
        given = [key for key in ("claim", "size_gib", "object_path") if getattr(self, key) is not None]
        broken = []
        if len(given) != 1:
            rule = f"{' and '.join(given)} are different places" if given else "no place for the run's folder is named"
            fix = "keep one: claim: NAME, or size_gib: 100 with a storage_class, or object_path: s3://bucket/folder"
            value = getattr(self, given[-1]) if given else None
            broken.append(Broken(keys=(given[-1] if given else "claim", *given), value=value, rule=rule, fix=fix))
        elif self.storage_class is not None and self.size_gib is None:
            rule = f"only a new claim has a class, and {given[0]} is given"
            fix = "remove it, or write size_gib"
            broken.append(Broken(keys=("storage_class", given[0]), value=self.storage_class, rule=rule, fix=fix))
        refuse(broken)
        return self


class ServiceAccountSection(Section):
    """As whom the pods act, towards an object store above all."""

    name: ObjectName = Field(description="[name] of the ServiceAccount")
    create: bool = Field(default=False, description="[true or false] also make it; false: it is there")
    annotations: Annotations = Field(
        default_factory=dict, description="[mapping] of an account that is made, such as eks.amazonaws.com/role-arn"
    )

    @model_validator(mode="after")
    def _rules(self) -> ServiceAccountSection:
        if self.annotations and not self.create:
            rule, fix = "an account that is there is not changed", "write create: true, or annotate it with kubectl"
            refuse([Broken(keys=("annotations", "create"), value=self.annotations, rule=rule, fix=fix)])
        return self


class KueueSection(Section):
    """The queue that the job waits in."""

    queue: ObjectName = Field(description="[name] of the LocalQueue in the job's namespace")
    elastic: bool = Field(
        default=False,
        description="[true or false] workers come and go while it runs (Kueue 0.16, with the feature gate "
        "ElasticJobsViaWorkloadSlices); false: pods for workers.max from beginning to end",
    )


class PodMonitorSection(Section):
    """What the Prometheus operator is told to scrape."""

    labels: Labels = Field(default_factory=dict, description="[labels] by which your Prometheus chooses its monitors")
    interval_s: int = Field(default=15, ge=1, description="[s] between two readings")


class SecretKeySection(Section):
    """One value in a Secret."""

    secret: ObjectName = Field(description="[name] of the Secret")
    key: SecretKey = Field(description="[name] of the value in the Secret")


class ClusterSection(Section):
    """A Kubernetes cluster with the KubeRay operator."""

    image: Image = Field(
        description="[image] of every pod, with groundswell and your own code in it: registry/name:tag"
    )
    image_pull_secrets: Annotated[tuple[ObjectName, ...], Field(strict=False)] = Field(
        default=(), description="[list of names] Secrets that the image is fetched with"
    )
    name: JobName | None = Field(
        default=None, description="[name] of the job and of what belongs to it; null: made of run.name"
    )
    namespace: Namespace | None = Field(default=None, description="[name] where it runs; null: where kubectl is")
    service_account: ServiceAccountSection | None = Field(
        default=None, description="[section] as whom the pods act; null: the namespace's default"
    )
    head: HeadSection = Field(default_factory=HeadSection, description="[section] the pod of Ray's own services")
    worker_groups: Annotated[tuple[WorkerGroupSection, ...], Field(strict=False)] = Field(
        description="[list of sections] pods that train, those to be asked for first at the top"
    )
    storage: StorageSection = Field(description="[section] where the run's folder lies")
    active_deadline_s: int | None = Field(
        default=None, ge=1, le=_MOST, description="[s] the job is ended after so long, whatever it does; null: never"
    )
    pre_running_deadline_s: int | None = Field(
        default=1800,
        ge=1,
        le=_MOST,
        description="[s] it is given up if its pods have not started by then; null: it waits on",
    )
    ttl_s: int = Field(
        default=600, ge=0, le=_MOST, description="[s] the pods of a job that ended stay so long, to be looked at"
    )
    backoff_limit: int = Field(
        default=2,
        ge=0,
        le=_MOST,
        description="[clusters] a job that failed goes on so often, each time on a new cluster",
    )
    idle_timeout_s: int = Field(
        default=60, ge=1, le=_MOST, description="[s] a pod without a worker is given back after so long"
    )
    kueue: KueueSection | None = Field(default=None, description="[section] the queue to wait in; null: none")
    pod_monitor: PodMonitorSection | None = Field(
        default=None, description="[section] have Prometheus scrape the pods; null: no; {} asks for it as it is"
    )
    env: Annotated[dict[str, str], VARIABLE_NAMES] = Field(
        default_factory=dict, description="[mapping] variables of every pod, none of them secret"
    )
    secret_env: Annotated[dict[str, SecretKeySection], VARIABLE_NAMES] = Field(
        default_factory=dict, description="[mapping] variables of every pod from Secrets: NAME: {secret: S, key: K}"
    )
    labels: Labels = Field(default_factory=dict, description="[labels] of all objects and pods")
    annotations: Annotations = Field(default_factory=dict, description="[mapping] annotations of all objects and pods")

    @model_validator(mode="after")
    def _rules(self) -> ClusterSection:
        broken = [*self._variable_rules(), *self._label_rules()]
        names = [group.name for group in self.worker_groups]
        if not names:
            rule, fix = "somebody must train", "write worker_groups: [{name: pods, memory_gib: 16}]"
            broken.append(Broken(keys=("worker_groups",), value=[], rule=rule, fix=fix))
        for index, name in enumerate(names):
            if name in names[:index]:
                key, rule = f"worker_groups[{index}].name", "another group has this name"
                broken.append(Broken(keys=(key,), value=name, rule=rule, fix=f"write {name}-{index + 1}"))
        refuse(broken)
        return self

    def _variable_rules(self) -> list[Broken]:
        broken = []
        for name, value in self.env.items():
            secret = _SECRET_NAME.search(name) and not _NAMES_A_PLACE.search(name)
            if secret or _PASSWORD_IN_ADDRESS.search(value):
                rule = "reads like a secret, and a manifest is no place for one"
                fix = f"write secret_env: {{{name}: {{secret: NAME, key: KEY}}}}, and make the Secret with kubectl"
                broken.append(Broken(keys=(f"env.{name}",), value="(not shown)", rule=rule, fix=fix))
        for name in (*self.env, *self.secret_env):
            key = "env" if name in self.env else "secret_env"
            if name in OWN_VARIABLES:
                rule = "is set by groundswell or by KubeRay"
                broken.append(Broken(keys=(f"{key}.{name}",), value=None, rule=rule, fix="remove it"))
        for name in self.env.keys() & self.secret_env.keys():
            rule = "is given as text and as a secret"
            broken.append(Broken(keys=(f"secret_env.{name}", f"env.{name}"), value=None, rule=rule, fix="keep one"))
        return broken

    def _label_rules(self) -> list[Broken]:
        given: list[tuple[str, dict[str, Any]]] = [("labels", self.labels), ("annotations", self.annotations)]
        return [
            Broken(keys=(name,), value=key, rule="this domain is for groundswell, KubeRay and Kueue", fix="rename it")
            for name, mapping in given
            for key in mapping
            if key.startswith(_OWN_DOMAINS)
        ]
