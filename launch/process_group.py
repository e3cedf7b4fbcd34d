"""How do the processes that torchrun started find each other, and which GPU is whose?"""

from __future__ import annotations

import os

from orchestrator.errors import SessionError


def join(backend: str) -> None:
    """Form the process group.

    On one machine with a store of our own making: torchrun keeps one store for all restarts, in which a worker that
    was started again may find the address of one that is dead (seen with torch 2.13: connection refused). The
    restart count tells them apart, but only within one agent: those of several machines count for themselves. With
    several, ``groundswell torchrun`` has torch make a new store with each group, in rank zero's process, and no more
    is needed.
    """
    import torch.distributed as dist

    env = os.environ
    if env.get("GROUP_WORLD_SIZE") != "1" or env.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        dist.init_process_group(backend)
        return
    kept = dist.TCPStore(env["MASTER_ADDR"], int(env["MASTER_PORT"]), is_master=False)  # type: ignore[attr-defined]  # C++
    store = dist.PrefixStore(f"groundswell/{env['TORCHELASTIC_RESTART_COUNT']}", kept)  # type: ignore[attr-defined]  # C++
    dist.init_process_group(backend, store=store, rank=int(env["RANK"]), world_size=int(env["WORLD_SIZE"]))


def own_gpu(num_gpus: int) -> int | None:
    """The GPU of this process, or ``None`` for the CPU."""
    here, local = int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["LOCAL_RANK"])
    if 0 < num_gpus < here:
        raise SessionError(
            f"{here} processes on a machine with {num_gpus} GPUs: a GPU serves one process; start at most {num_gpus} "
            "(workers.initial, or --nproc-per-node), or hide the GPUs with CUDA_VISIBLE_DEVICES="
        )
    return local if num_gpus else None
