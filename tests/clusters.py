"""Configs with a section ``cluster``, drawn at random: all that is drawn is right."""

from __future__ import annotations

import string
from typing import Any

from hypothesis import strategies as st

TRAINS: dict[str, Any] = {
    "run": {"name": "drawn"},
    "task": {"name": "digits"},
    "train": {"epochs": 1},
    "batch": {"initial": 64, "micro_batch": 8, "max": 128},
    "optimizer": {"name": "sgd", "lr": 0.1},
}

_NAMES = st.text(string.ascii_lowercase + string.digits + "-", min_size=1, max_size=12).map(lambda t: f"a{t}z")
_VALUES = st.sampled_from(["", "on", "1", "true", "1e3", "0x1f", "null", "v1.2_x", "2024-01-01", "017", "1:30", "~x"])
_LABELS = st.dictionaries(
    _NAMES | _NAMES.map(lambda t: f"team.example/{t}"),
    _VALUES.filter(lambda t: "~" not in t and ":" not in t),
    max_size=2,
)
_TEXTS = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), max_size=12)
_TOLERATIONS = st.lists(
    st.fixed_dictionaries(
        {"key": _NAMES}, optional={"value": st.sampled_from(["on", "1"]), "effect": st.sampled_from(["NoExecute"])}
    ),
    max_size=2,
)
_PLACES = {"node_selector": _LABELS, "tolerations": _TOLERATIONS, "priority_class": st.none() | _NAMES}
_STORAGES = st.one_of(
    st.fixed_dictionaries({"claim": _NAMES}),
    st.fixed_dictionaries({"size_gib": st.integers(1, 500), "storage_class": st.none() | _NAMES}),
    st.fixed_dictionaries({"object_path": st.sampled_from(["s3://bucket", "gs://bucket/a/b"])}),
)


@st.composite
def run_configs(draw: st.DrawFn) -> dict[str, Any]:
    """Plain data of a run with a cluster of one to three groups, whose pods come out even by construction."""
    kueue = draw(st.none() | st.fixed_dictionaries({"queue": _NAMES, "elastic": st.booleans()}))
    fixed = kueue is not None and not kueue["elastic"]
    each = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    pods = draw(st.lists(st.integers(1, 3), min_size=len(each), max_size=len(each)))
    room = [a * b for a, b in zip(each, pods, strict=True)]
    most = sum(room) if fixed else draw(st.integers(max(room), sum(room)))
    least = draw(st.integers(1, most))
    gpus = draw(st.sampled_from([0.0, 1.0, 2.0]))
    groups = []
    for index, (per_pod, workers) in enumerate(zip(each, room, strict=True)):
        spot = draw(st.booleans())
        group = {
            "name": f"group-{index}",
            "memory_gib": draw(st.integers(1, 512)),
            "workers_per_pod": per_pod,
            "max_workers": workers,
            **draw(st.fixed_dictionaries({}, optional=_PLACES)),
        }
        if spot:
            group |= {"capacity": "spot", "node_selector": {"kind": "spot", **group.get("node_selector", {})}}
        groups.append(group)
    optional = {
        "image_pull_secrets": st.lists(_NAMES, max_size=2, unique=True),
        "name": _NAMES,
        "namespace": _NAMES,
        "service_account": st.fixed_dictionaries({"name": _NAMES, "create": st.booleans()}),
        "head": st.fixed_dictionaries({}, optional={"cpus": st.integers(2, 8), **_PLACES}),
        "active_deadline_s": st.integers(1, 10**6),
        "pre_running_deadline_s": st.none() | st.integers(1, 10**5),
        "ttl_s": st.integers(0, 2**31 - 1),
        "backoff_limit": st.integers(0, 9),
        "idle_timeout_s": st.integers(1, 600),
        "pod_monitor": st.fixed_dictionaries({"labels": _LABELS}),
        "env": st.dictionaries(st.sampled_from(["MODE", "LEVEL", "a_b"]), _VALUES | _TEXTS, max_size=2),
        "secret_env": st.dictionaries(
            st.sampled_from(["API_KEY", "X_TOKEN"]),
            st.fixed_dictionaries({"secret": _NAMES, "key": _NAMES}),
            max_size=2,
        ),
        "labels": _LABELS,
        "annotations": st.dictionaries(_NAMES, _TEXTS, max_size=2),
    }
    cluster = {
        "image": draw(st.sampled_from(["a:1", "host:5000/a/b:v1", f"a@sha256:{'0' * 64}"])),
        "worker_groups": groups,
        "storage": draw(_STORAGES),
        "kueue": kueue,
        **draw(st.fixed_dictionaries({}, optional=optional)),
    }
    workers = {
        "min": least,
        "initial": draw(st.integers(least, most)),
        "max": most,
        "gpus_per_worker": gpus,
        "cpus_per_worker": draw(st.sampled_from([1.0, 2.0])),
    }
    return {**TRAINS, "workers": workers, "cluster": cluster}


# Five clusters as people have them: sections of a config by the file that --explain of it is kept in.
REALISTIC: dict[str, dict[str, Any]] = {
    "cpu_only": {
        "workers": {"min": 1, "initial": 2, "max": 8, "cpus_per_worker": 4.0},
        "cluster": {
            "image": "registry.example.com/team/train:1.4",
            "worker_groups": [{"name": "cpu", "memory_gib": 16, "cpus": 6}],
            "storage": {"claim": "team-runs"},
            "env": {"NCCL_DEBUG": "WARN"},
        },
    },
    "one_gpu_group": {
        "workers": {"min": 1, "initial": 8, "max": 32, "cpus_per_worker": 8.0, "gpus_per_worker": 1.0},
        "cluster": {
            "image": f"registry.example.com/team/train@sha256:{'ab' * 32}",
            "image_pull_secrets": ["registry"],
            "name": "llm-pretraining",
            "namespace": "research",
            "worker_groups": [
                {
                    "name": "a100",
                    "workers_per_pod": 8,
                    "cpus": 90,
                    "memory_gib": 900,
                    "node_selector": {"cloud.google.com/gke-accelerator": "nvidia-tesla-a100"},
                    "tolerations": [{"key": "nvidia.com/gpu"}],
                    "priority_class": "training",
                }
            ],
            "storage": {"size_gib": 2000, "storage_class": "filestore-rwx"},
            "active_deadline_s": 604800,
            "pod_monitor": {"labels": {"release": "prometheus"}},
            "secret_env": {"WANDB_API_KEY": {"secret": "wandb", "key": "api-key"}},
        },
    },
    "spot_plus_on_demand": {
        "workers": {"min": 2, "initial": 4, "max": 16, "cpus_per_worker": 4.0, "gpus_per_worker": 1.0},
        "cluster": {
            "image": "registry.example.com/team/train:1.4",
            "worker_groups": [
                {
                    "name": "spot",
                    "capacity": "spot",
                    "workers_per_pod": 4,
                    "max_workers": 12,
                    "memory_gib": 128,
                    "node_selector": {"eks.amazonaws.com/capacityType": "SPOT", "team.example/gpu": "l4"},
                    "tolerations": [{"key": "spot", "value": "true", "effect": "NoExecute"}],
                },
                {"name": "on-demand", "workers_per_pod": 4, "max_workers": 8, "memory_gib": 128},
            ],
            "storage": {"claim": "team-runs", "mount_path": "/mnt/efs"},
            "labels": {"cost-centre": "ml"},
        },
    },
    "kueue": {
        "workers": {"min": 2, "initial": 2, "max": 4, "cpus_per_worker": 8.0, "gpus_per_worker": 1.0},
        "cluster": {
            "image": "registry.example.com/team/train:1.4",
            "worker_groups": [{"name": "gpu", "memory_gib": 64}],
            "storage": {"claim": "team-runs"},
            "kueue": {"queue": "team-queue"},
            "pre_running_deadline_s": None,
        },
    },
    "object_storage": {
        "workers": {"min": 1, "initial": 1, "max": 4, "cpus_per_worker": 2.0},
        "cluster": {
            "image": "registry.example.com/team/train:1.4",
            "service_account": {
                "name": "trainer",
                "create": True,
                "annotations": {"eks.amazonaws.com/role-arn": "arn:aws:iam::123456789012:role/trainer"},
            },
            "worker_groups": [{"name": "cpu", "memory_gib": 8}],
            "storage": {"object_path": "s3://team-bucket/runs"},
            "kueue": {"queue": "team-queue", "elastic": True},
        },
    },
}


def realistic(name: str) -> dict[str, Any]:
    """A whole config with the cluster of this name, as plain data."""
    return {**TRAINS, "run": {"name": name.replace("_", "-")}, **REALISTIC[name]}
