"""Which parts of a model are sharded, and is what a session was given sharded as it must be?"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from orchestrator.config import RunConfig
from orchestrator.errors import SessionError
from orchestrator.runtime.worker import Worker

LEAST_PARAMETERS = 100_000  # of a part that is gathered by itself; less is not worth an exchange of its own
_NEEDED = ((FSDPModule, "reset_iter_state"), (dist, "all_gather_single"), (dist, "reduce_scatter_single"))


def shard(model: nn.Module, config: RunConfig, worker: Worker) -> nn.Module:
    """Collective. Make ``model`` what ``train.parallel`` asks for, in place; call it before the optimizer is built.

    With ``fsdp2`` and several workers the weights of rank zero are sharded over all: each child of an
    ``nn.ModuleList`` or ``nn.Sequential`` that has 100,000 parameters or more is gathered by itself (a container
    among them is looked into instead), and all the rest together with the outermost module. What
    ``torch.distributed.fsdp.fully_shard`` was called on before stays as it is.
    """
    if config.train.parallel != "fsdp2" or worker.world_size == 1:
        return model
    check_torch()
    model.to(worker.device)
    if isinstance(model, FSDPModule):
        return model
    for tensor in (*model.parameters(), *model.buffers()):
        if not (isinstance(tensor, DTensor) or tensor.is_meta):
            dist.broadcast(tensor.detach(), src=0)
    mesh = init_device_mesh(worker.device.type, (worker.world_size,))
    for block in _blocks(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def is_sharded(model: nn.Module) -> bool:
    return any(isinstance(module, FSDPModule) for module in model.modules())


def check_torch() -> None:
    """Raises ``SessionError`` where torch cannot take up training after a pass that failed."""
    missing = [name for place, name in _NEEDED if not hasattr(place, name)]
    if missing:
        raise SessionError(
            f"train.parallel: fsdp2 needs torch 2.13 or newer, and torch {torch.__version__} has no {missing[0]}: "
            "install it, or write train.parallel: ddp"
        )


def check_sharded(model: nn.Module, optimizer: torch.optim.Optimizer, *, world_size: int) -> None:
    """Raises ``SessionError`` unless all of ``model`` is sharded over all ranks, and ``optimizer`` holds the shards."""
    if not isinstance(model, FSDPModule):
        raise SessionError(
            "train.parallel is fsdp2 and the model is not sharded: call orchestrator.shard(model, config, worker), or "
            "fully_shard on the model itself, before the optimizer is built from its parameters"
        )
    for name, parameter in model.named_parameters():
        if not isinstance(parameter, DTensor):
            raise SessionError(
                f"parameter {name} is not sharded, so its gradient would not be averaged over the ranks: shard it "
                "too (no ignored_params), or write train.parallel: ddp"
            )
        if parameter.device_mesh.ndim != 1 or parameter.device_mesh.size() != world_size:
            raise SessionError(
                f"parameter {name} lies on {parameter.device_mesh}, and the run has {world_size} workers in one "
                "dimension: shard over a one-dimensional mesh of all of them"
            )
    for name, module in model.named_modules():
        if getattr(module, "sparse", False):
            raise SessionError(
                f"module {name} has sparse gradients, which FSDP cannot reduce: build it with sparse=False, or write "
                "train.parallel: ddp"
            )
    known = {id(parameter) for parameter in model.parameters()}
    strangers = [p for group in optimizer.param_groups for p in group["params"] if id(p) not in known]
    if strangers:
        raise SessionError(
            f"the optimizer holds {len(strangers)} parameters that are not the model's, the first of shape "
            f"{tuple(strangers[0].shape)}: sharding replaces the parameters, so shard the model first and build the "
            "optimizer from model.parameters() after"
        )


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """What is gathered by itself, innermost first."""
    for child in module.children():
        if isinstance(child, FSDPModule):
            continue
        in_row = isinstance(module, (nn.ModuleList, nn.Sequential))
        container = isinstance(child, (nn.ModuleList, nn.Sequential))
        if in_row and not container and sum(p.numel() for p in child.parameters()) >= LEAST_PARAMETERS:
            yield child
        else:
            yield from _blocks(child)
