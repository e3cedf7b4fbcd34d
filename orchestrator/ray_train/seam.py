"""What of Ray Train's inside the change of a running group relies on, and whether the Ray at hand still has it.

Those names are no promise of Ray's, and another release may have others. Where one is missing, or has changed its
parameters, resizes are the graceful restart, and the run says why. ``changes`` is asked before anything starts.
"""

from __future__ import annotations

import dis
import importlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

_V2 = "ray.train.v2._internal"
_EXECUTION = f"{_V2}.execution"
_GROUP = f"{_EXECUTION}.worker_group"


@dataclass(frozen=True, slots=True, kw_only=True)
class Relied:
    """A class or a function, and what of it is relied on."""

    module: str
    name: str
    parameters: tuple[str, ...] | None = None  # of the function itself; more may follow if they have defaults
    methods: Mapping[str, tuple[str, ...] | None] = field(default_factory=dict)  # the same, after ``self``; None: any
    fields: tuple[str, ...] = ()  # of a dataclass, or set by its methods
    uses: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # names that a method must go by


RELIED_ON: tuple[Relied, ...] = (
    Relied(
        module="ray.train.v2.api.data_parallel_trainer",
        name="DataParallelTrainer",
        uses={"_initialize_and_run_controller": ("TrainController",)},
    ),
    Relied(
        module=f"{_EXECUTION}.controller",
        name="TrainController",
        methods={"_start_worker_group": ("num_workers", "resources_per_worker"), "_poll_workers": ()},
        fields=(
            "_scaling_policy",
            "_worker_group",
            "_worker_group_callbacks_to_propagate",
            "_health_check_interval_s",
            "_latest_poll_time",
        ),
        uses={
            "_start_worker_group": ("worker_group_cls",),
            "_execute_resize_decision": ("_start_worker_group",),
            "_step": ("_poll_workers",),
        },
    ),
    Relied(
        module=_GROUP,
        name="WorkerGroup",
        methods={
            "_create_placement_group": ("scaling_config", "worker_group_context"),
            "_create_workers": ("num_workers", "placement_group", "resources_per_worker"),
            "_assign_worker_ranks": ("workers", "starting_world_rank", "world_size"),
            "_init_train_context": ("workers", "sync_actor"),
            "_poll_workers_and_collect_errors": ("timeout",),
            "_clear_state": (),
            "get_workers": (),
            "get_worker_group_state": (),
            "get_worker_group_context": (),
        },
        fields=(
            "_worker_group_context",
            "_worker_group_state",
            "_worker_group_start_timeout_s",
            "_callbacks",
            "_replica_groups",
            "_replica_group_callbacks",
            "_worker_rank_to_replica_group_rank",
            "_world_rank_to_ongoing_poll",
        ),
        uses={
            "_start_impl": ("_create_placement_group", "_create_workers", "_init_train_context"),
            "poll_status": ("_poll_workers_and_collect_errors",),
            "shutdown": ("_clear_state",),
        },
    ),
    Relied(
        module=f"{_GROUP}.execution_group",
        name="ReplicaGroup",
        methods={
            "__init__": ("workers", "resources_per_worker", "callbacks"),
            "start_training": ("worker_group_context",),
        },
    ),
    Relied(
        module=f"{_GROUP}.worker",
        name="Worker",
        methods={"execute_async": None},
        fields=("actor", "metadata", "distributed_context"),
    ),
    Relied(module=f"{_GROUP}.worker", name="ActorMetadata", fields=("node_id", "node_ip", "pid")),
    Relied(
        module=f"{_GROUP}.poll",
        name="WorkerStatus",
        fields=("running", "error", "training_report", "preemption_info"),
    ),
    Relied(
        module=f"{_GROUP}.state",
        name="WorkerGroupContext",
        fields=("num_workers", "resources_per_worker", "placement_strategy", "label_selector"),
    ),
    Relied(
        module=f"{_GROUP}.state",
        name="WorkerGroupState",
        fields=("start_time", "placement_group_handle", "workers", "sync_actor"),
    ),
    Relied(
        module=f"{_GROUP}.placement_group_handle",
        name="PlacementGroupHandle",
        methods={"ready": (), "wait": ("timeout_seconds",), "shutdown": ()},
    ),
    Relied(
        module=f"{_EXECUTION}.checkpoint.report_handler",
        name="ReportCallbackHandler",
        methods={"_get_required_ranks": ()},
        fields=("_training_report_queues",),
    ),
    Relied(
        module=f"{_EXECUTION}.checkpoint.checkpoint_manager",
        name="CheckpointManager",
        fields=("_current_report_index",),
    ),
    Relied(module=f"{_EXECUTION}.checkpoint.sync_actor", name="SynchronizationActor", methods={"reset": ()}),
    Relied(
        module=f"{_EXECUTION}.training_report",
        name="_TrainingReport",
        methods={"__init__": ("checkpoint", "metrics", "validation")},
    ),
    Relied(
        module=f"{_EXECUTION}.context",
        name="DistributedContext",
        fields=("world_rank", "world_size", "local_rank", "local_world_size", "node_rank"),
    ),
    Relied(
        module=f"{_EXECUTION}.context",
        name="TrainContext",
        fields=(
            "distributed_context",
            "execution_context",
            "report_order_condition",
            "report_call_index",
            "current_report_index",
            "collective_seq",
        ),
        uses={"_wait_then_report": ("get_result_queue", "put", "current_report_index")},
    ),
    Relied(module=f"{_EXECUTION}.context", name="ExecutionContext", fields=("result_queue",)),
    Relied(module=f"{_EXECUTION}.context", name="get_train_context", parameters=()),
    Relied(module=f"{_V2}.callbacks.datasets", name="DatasetsCallback", fields=("_datasets",)),
    Relied(
        module=f"{_V2}.callbacks.preemption_callback",
        name="PreemptionCallback",
        methods={"after_worker_group_start": ("worker_group",), "_stop_watcher": ()},
        fields=("_watcher", "_poll_interval_s"),
    ),
    Relied(
        module=f"{_EXECUTION}.preemption",
        name="PreemptionWatcher",
        methods={"__init__": ("node_to_ranks", "poll_interval_s", "worker_actors_by_rank")},
        fields=("_stop_event",),
        uses={"_watch_loop": ("_stop_event",)},
    ),
    Relied(module=f"{_V2}.exceptions", name="WorkerHealthCheckFailedError"),
    Relied(module=f"{_V2}.exceptions", name="WorkerHealthCheckTimeoutError"),
    Relied(
        module="ray.train.torch.config", name="_TorchBackend", methods={"on_start": ("worker_group", "backend_config")}
    ),
    Relied(module="ray.train.torch.config", name="TorchConfig", methods={"backend_cls": None}),
    Relied(module="ray.train.torch.config", name="_set_torch_distributed_env_vars", parameters=()),
)


def changes(relied_on: Sequence[Relied] = RELIED_ON) -> list[str]:
    """What is missing or different, a short sentence each; nothing where Ray is as it is relied on to be."""
    return [change for relied in relied_on for change in _changes_of(relied)]


def _changes_of(relied: Relied) -> Iterator[str]:
    try:
        found = getattr(importlib.import_module(relied.module), relied.name)
    except (ImportError, AttributeError):
        yield f"{relied.module}.{relied.name} is gone"
        return
    if relied.parameters is not None:
        yield from _differs(relied.name, found, relied.parameters)
    for method, parameters in relied.methods.items():
        if not hasattr(found, method):
            yield f"{relied.name}.{method} is gone"
        elif parameters is not None:
            yield from _differs(f"{relied.name}.{method}", inspect.getattr_static(found, method), parameters)
    there = _fields_of(found) if relied.fields else set()
    for name in relied.fields:
        if name not in there:
            yield f"{relied.name} has no {name}"
    for method, names in relied.uses.items():
        used = _names_in(getattr(found, method, None))
        for name in names:
            if name not in used:
                yield f"{relied.name}.{method} does not go by {name}"


def _differs(name: str, found: Any, expected: tuple[str, ...]) -> Iterator[str]:
    is_static = isinstance(found, staticmethod)
    function = found.__func__ if is_static else found
    if not callable(function):
        yield f"{name} is no function"
        return
    parameters = list(inspect.signature(function).parameters.values())
    if "." in name and not is_static:
        parameters = parameters[1:]  # self
    begins = tuple(one.name for one in parameters[: len(expected)])
    demands = [one.name for one in parameters[len(expected) :] if one.default is one.empty and _is_named(one)]
    if begins != expected or demands:
        seen = ", ".join(one.name for one in parameters)
        yield f"{name} takes ({seen}) and not ({', '.join(expected)})"


def _is_named(parameter: inspect.Parameter) -> bool:
    return parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)


def _fields_of(found: type) -> set[str]:
    """The names of a dataclass's fields, and of what a class's methods set in ``self``."""
    names = set(getattr(found, "__dataclass_fields__", {}))
    for base in found.__mro__:
        for one in vars(base).values():
            if isinstance(one, FunctionType):
                names |= {code.argval for code in dis.get_instructions(one) if code.opname == "STORE_ATTR"}
    return names


def _names_in(function: Any) -> set[str]:
    """Globals and attributes that a function's code mentions."""
    return set(function.__code__.co_names) if isinstance(function, FunctionType) else set()
