"""How many pods does a run need, so that what the controller may ask for is what the cluster may give?

``workers.min``, ``initial`` and ``max`` are counted in workers, and pods hold ``workers_per_pod`` of them. The most
must come out even, since a pod that is partly used costs as much as a whole one for as long as the run is at its
largest; ``min`` and ``initial`` are rounded up to whole pods, whose spare places the run grows into.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from orchestrator.config.cluster import ClusterSection, WorkerGroupSection
from orchestrator.config.execution import WorkersSection
from orchestrator.config.kubernetes_names import LONGEST_JOB_NAME, is_job_name
from orchestrator.config.section import Broken

_MOST_QUEUED_GROUPS = 6  # Kueue admits eight sets of pods for a job; the head and the submitter are two of them


@dataclass(frozen=True, slots=True, kw_only=True)
class PodCount:
    """Pods of one group: while the run is at its smallest, at its start, and at its largest."""

    group: WorkerGroupSection
    min: int
    initial: int
    max: int


def job_name(cluster: ClusterSection, run_name: str) -> str:
    """The name of the job and of what belongs to it; where it is made of ``run_name`` it may be no right one."""
    return cluster.name or re.sub(r"[._]+", "-", run_name.lower()).strip("-")


def cpus_of(group: WorkerGroupSection, workers: WorkersSection) -> int:
    """CPU cores that the workers of a pod reserve."""
    return round(group.workers_per_pod * workers.cpus_per_worker)


def gpus_of(group: WorkerGroupSection, workers: WorkersSection) -> int:
    """GPUs of a pod."""
    return round(group.workers_per_pod * workers.gpus_per_worker)


def pod_counts(cluster: ClusterSection, workers: WorkersSection) -> list[PodCount]:
    """The pods of each group, in the order of the groups.

    The fewest workers are put on on-demand pods as far as there are any, so that the loss of all spot nodes leaves a
    run that goes on; what it begins with beyond them is put into the groups in their order.
    """
    groups = cluster.worker_groups
    most = [_most_workers(group, workers) // group.workers_per_pod for group in groups]
    if is_fixed(cluster):
        return [PodCount(group=g, min=n, initial=n, max=n) for g, n in zip(groups, most, strict=True)]
    steadiest = sorted(range(len(groups)), key=lambda i: groups[i].capacity == "spot")
    fewest = _fill([0] * len(groups), most, groups, workers.min, steadiest)
    first = _fill(fewest, most, groups, workers.initial, list(range(len(groups))))
    return [
        PodCount(group=g, min=low, initial=begin, max=high)
        for g, low, begin, high in zip(groups, fewest, first, most, strict=True)
    ]


def is_fixed(cluster: ClusterSection) -> bool:
    """Whether all pods are there from beginning to end, as Kueue wants it of a job that is not elastic."""
    return cluster.kueue is not None and not cluster.kueue.elastic


def cluster_rules(cluster: ClusterSection, workers: WorkersSection, run_name: str) -> list[Broken]:
    """What does not go together between ``cluster`` and the sections ``workers`` and ``run``."""
    broken = []
    name = job_name(cluster, run_name)
    if not is_job_name(name):
        rule = f"run.name, {run_name}, makes no name of at most {LONGEST_JOB_NAME} letters, digits and '-'"
        broken.append(Broken(keys=("cluster.name", "run.name"), value=None, rule=rule, fix="give cluster.name"))
    for index, group in enumerate(cluster.worker_groups):
        broken += _group_rules(f"cluster.worker_groups[{index}]", group, workers)
    if broken:
        return broken
    room = sum(_most_workers(group, workers) for group in cluster.worker_groups)
    keys = ("cluster.worker_groups", "workers.max")
    if room < workers.max:
        rule = f"their pods hold {room} workers, and the controller may ask for workers.max, {workers.max}"
        broken.append(Broken(keys=keys, value=None, rule=rule, fix=f"raise max_workers, or write workers.max: {room}"))
    if is_fixed(cluster) and room > workers.max:
        rule = f"Kueue would start pods for {room} workers, and workers.max is {workers.max}"
        fix = "lower max_workers of the groups, or write cluster.kueue.elastic: true"
        broken.append(Broken(keys=(*keys, "cluster.kueue"), value=None, rule=rule, fix=fix))
    if cluster.kueue is not None and len(cluster.worker_groups) > _MOST_QUEUED_GROUPS:
        rule = f"Kueue takes at most {_MOST_QUEUED_GROUPS} groups, and there are {len(cluster.worker_groups)}"
        broken.append(Broken(keys=("cluster.worker_groups", "cluster.kueue"), value=None, rule=rule, fix="merge some"))
    return broken


def _group_rules(key: str, group: WorkerGroupSection, workers: WorkersSection) -> list[Broken]:
    broken = []
    each, most = group.workers_per_pod, _most_workers(group, workers)
    own = "max_workers" if group.max_workers is not None else "workers_per_pod"
    if most > workers.max:
        rule, fix = f"more than workers.max, {workers.max}, are never asked for", f"write {workers.max} or less"
        broken.append(Broken(keys=(f"{key}.max_workers", "workers.max"), value=most, rule=rule, fix=fix))
    elif most % each:
        rule = f"{most} workers do not fill pods of {each}, and the last pod would be paid for and partly unused"
        fix = f"write workers_per_pod: {_divisor(most, each)}, or a maximum of {most // each * each or each}"
        value = getattr(group, own)
        broken.append(Broken(keys=(f"{key}.{own}", "workers.max"), value=value, rule=rule, fix=fix))
    for name, what in (("cpus_per_worker", "CPU cores"), ("gpus_per_worker", "GPUs")):
        amount = each * getattr(workers, name)
        if abs(amount - round(amount)) > 1e-9 or 0 < amount < 0.5:
            rule = f"{each} times workers.{name} are {amount:g} {what}, and a pod announces whole ones to Ray"
            fix = f"choose it so that {each} x workers.{name} is whole"
            keys = (f"{key}.workers_per_pod", f"workers.{name}")
            broken.append(Broken(keys=keys, value=each, rule=rule, fix=fix))
    needed = each * workers.cpus_per_worker
    if group.cpus is not None and group.cpus < needed:
        rule = f"fewer than its workers reserve, {each} x workers.cpus_per_worker"
        keys = (f"{key}.cpus", "workers.cpus_per_worker")
        broken.append(Broken(keys=keys, value=group.cpus, rule=rule, fix=f"write {needed:g} or more, or leave it out"))
    return broken


def _most_workers(group: WorkerGroupSection, workers: WorkersSection) -> int:
    return workers.max if group.max_workers is None else group.max_workers


def _divisor(count: int, near: int) -> int:
    """The largest number up to ``near`` that divides ``count``."""
    return next(each for each in range(min(near, count), 0, -1) if count % each == 0)


def _fill(
    pods: list[int], most: list[int], groups: tuple[WorkerGroupSection, ...], workers: int, order: list[int]
) -> list[int]:
    """``pods`` with as many more, in ``order``, as it takes to hold ``workers``."""
    filled = list(pods)
    for index in order:
        missing = workers - sum(n * g.workers_per_pod for n, g in zip(filled, groups, strict=True))
        if missing > 0:
            wanted = -(-missing // groups[index].workers_per_pod)
            filled[index] = min(most[index], filled[index] + wanted)
    return filled
