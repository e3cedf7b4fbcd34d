"""Checkpoints that exist whole or not at all, and are proved whole before they are used.

All ranks write into a temporary folder through ``torch.distributed.checkpoint``; rank zero adds the metadata and a
manifest of checksums, and renames. Where all ranks hold the same state, rank zero can do it alone, behind the back of
training. Nothing else in the project creates, chooses or deletes a checkpoint.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor

from orchestrator.errors import CheckpointError
from orchestrator.ports import Collective
from orchestrator.runtime.background_save import BackgroundSave, HostCopy, write_alone, writer_into
from orchestrator.runtime.checkpoint_files import (
    META,
    Fault as Fault,
    choose,
    found,
    found_within,
    read_meta,
    verify as verify,
    write_manifest,
)
from orchestrator.runtime.model_differences import model_differences
from orchestrator.runtime.safe_loading import CheckpointReader, PlainDataPlanner

_UNMOVED = "unmoved"  # beside an optimizer's state: no step has made one yet


@final
class CheckpointStore:
    """The checkpoints of one run, under ``folder``; the newest ``keep`` stay. All ranks call every method."""

    def __init__(self, folder: Path, *, keep: int, collective: Collective) -> None:
        self._folder = folder
        self._keep = keep
        self._collective = collective
        self._host = HostCopy()
        self._under_way: tuple[int, BackgroundSave | None] | None = None  # of which step; the save is rank zero's

    def save(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        step: int,
        meta: Mapping[str, Any],
        ema: Mapping[str, Tensor] | None = None,
    ) -> Path:
        """Write one checkpoint. ``meta`` is plain data, read from rank zero only; ``ema``: averaged weights by name.

        Raises ``CheckpointError`` on every rank when it could not be written; older checkpoints are untouched.
        """
        assert self._under_way is None, "finish_save() comes first"
        final_path, partial = self.path_of(step), self._partial_of(step)
        problem = self._on_rank_zero(lambda: _make_empty(partial))
        if problem is None:
            problem = self._write_tensors(model, optimizer, partial, ema)
        if problem is None:
            problem = self._on_rank_zero(lambda: _commit(partial, final_path, json.dumps(meta)))
        if problem is not None:
            self._on_rank_zero(lambda: shutil.rmtree(partial, ignore_errors=True))
            raise self._not_written(step, problem)
        self._on_rank_zero(lambda: self._forget_old(step))
        return final_path

    def can_save_behind(self, model: nn.Module) -> bool:
        """Whether ``begin_save`` is possible: each rank holds all of the model, and none only a shard."""
        return not any(isinstance(tensor, DTensor) for tensor in model.parameters())

    def begin_save(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        step: int,
        meta: Mapping[str, Any],
        ema: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Begin what ``save`` does, and return once the state is copied: rank zero writes it alone, in a thread.

        One at a time: ``finish_save`` comes before the next, and before ``save``. On other ranks nothing happens.
        """
        assert self._under_way is None, "finish_save() comes first"
        save = None
        if self._collective.rank == 0:
            text = json.dumps(meta)
            try:
                tree = self._host.of(self._state_of(model, optimizer, ema))
            except (MemoryError, RuntimeError) as error:  # host memory that does not suffice for the copy
                problem = _cause(error)
                save = BackgroundSave(lambda: problem)
            else:
                save = BackgroundSave(lambda: self._write_behind(tree, step, text))
        self._under_way = step, save

    @property
    def under_way(self) -> int | None:
        """The step whose checkpoint ``begin_save`` began, until ``finish_save``."""
        return None if self._under_way is None else self._under_way[0]

    @property
    def is_written(self) -> bool:
        """Whether ``finish_save`` need not wait. Only rank zero knows."""
        save = None if self._under_way is None else self._under_way[1]
        return save is not None and save.is_over

    def finish_save(self, *, alone: bool = False) -> tuple[Path, float]:
        """Wait for what ``begin_save`` began: its path, and the seconds that the writing took.

        Raises ``CheckpointError`` on every rank when it could not be written. ``alone``: of rank zero, which training
        has failed on, so that the others cannot be asked.
        """
        assert self._under_way is not None, "begin_save() comes first"
        (step, save), self._under_way = self._under_way, None
        result = None if save is None else save.result()
        problem, took_s = result if alone and result is not None else self._collective.share(result)
        if problem is not None:
            raise self._not_written(step, problem)
        return self.path_of(step), took_s

    def forget_save(self) -> None:
        """What another rank was writing is left to it."""
        self._under_way = None

    def load_latest(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, ema: Mapping[str, Tensor] | None = None
    ) -> tuple[Path | None, dict[str, Any], tuple[Fault, ...]]:
        """Load the newest checkpoint that is whole: its path, its metadata, and those that were passed over.

        Tensors are loaded into those of ``ema`` too, if it is given.

        ``(None, {}, ())`` when there is none at all. Raises ``CheckpointError`` when every one is broken, or when
        the model, the optimizer or ``ema`` does not fit.
        """
        chosen, faults = self._collective.share(choose(found(self._folder)) if self._collective.rank == 0 else None)
        if chosen is None:
            if faults:
                listed = "; ".join(f"{fault.path}: {fault.why}" for fault in faults)
                raise CheckpointError(f"no checkpoint under {self._folder} is whole ({listed}); begin a new run")
            return None, {}, ()
        meta: dict[str, Any] = self._collective.share(read_meta(chosen) if self._collective.rank == 0 else None)
        # Torch makes the state to load into only for an optimizer that has no gradients yet and no state.
        optimizer.zero_grad(set_to_none=True)
        optimizer.state.clear()
        model_state, optimizer_state = get_state_dict(model, optimizer)
        state: dict[str, Any] = _tree(model_state, optimizer_state, ema)
        try:
            saved = _saved(chosen)
            _refuse_another_model(chosen, saved, model_state)
            _leave_out_unmoved(optimizer_state, saved)
            _load(state, chosen, no_dist=self._collective.world_size == 1)
            set_model_state_dict(model, model_state)
            # Not strict: parameters may be without a state, and what else is missing has been refused.
            options = StateDictOptions(strict=False)
            set_optimizer_state_dict(model, optimizer, optimizer_state, options=options)
        except CheckpointError:
            raise
        except (Exception, CheckpointException) as error:  # DCP raises several kinds, none of them narrow
            raise CheckpointError(
                f"checkpoint {chosen} does not fit this model and optimizer: {_cause(error)}; resume with "
                "the config and the code that wrote it, or begin a new run"
            ) from error
        return chosen, meta, faults

    def path_of(self, step: int) -> Path:
        return self._folder / f"step-{step:09d}"

    def _partial_of(self, step: int) -> Path:
        return self._folder / f".step-{step:09d}.partial"

    def _not_written(self, step: int, problem: str) -> CheckpointError:
        return CheckpointError(
            f"checkpoint of step {step} was not written to {self.path_of(step)}: {problem}; older checkpoints are "
            "untouched; make room or mend the storage, training can go on"
        )

    def _write_behind(self, tree: Mapping[str, Any], step: int, meta: str) -> str | None:
        """Rank zero's thread: write, commit, and forget the old ones; what went wrong, if something did."""
        partial = self._partial_of(step)
        try:
            _make_empty(partial)
            write_alone(tree, partial)
            _commit(partial, self.path_of(step), meta)
        except (Exception, CheckpointException) as error:  # DCP raises several kinds, none of them narrow
            shutil.rmtree(partial, ignore_errors=True)
            return _cause(error)
        self._forget_old(step)
        return None

    def _state_of(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, ema: Mapping[str, Tensor] | None
    ) -> dict[str, Any]:
        """What is saved, as one tree of the live tensors."""
        optimizer_state: Any
        unmoved = not optimizer.state
        model_state, optimizer_state = get_state_dict(model, optimizer)
        if unmoved and optimizer_state["state"]:
            # torch filled it by a step with gradients of zero, which counts, and takes the decay of the weights for a
            # gradient. Nothing of it belongs to the run, here or in what is saved.
            optimizer.state.clear()
            optimizer_state = {**optimizer_state, "state": {}, _UNMOVED: True}
        return _tree(model_state, optimizer_state, ema)

    def _write_tensors(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, path: Path, ema: Mapping[str, Tensor] | None
    ) -> str | None:
        tree = self._state_of(model, optimizer, ema)
        problem = None
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process: as meant
                state_dict_saver.save(
                    tree,
                    # Elsewhere a folder may have to be made: other nodes need not see rank zero's.
                    storage_writer=writer_into(path) if self._collective.rank == 0 else FileSystemWriter(path),
                    # What all ranks hold is rank zero's to write: other nodes may have a folder of their own there.
                    planner=DefaultSavePlanner(dedup_save_to_lowest_rank=True),
                    no_dist=self._collective.world_size == 1,
                )
        except (Exception, CheckpointException) as error:  # DCP wraps what any rank met
            problem = _cause(error)
        return self._first(problem)

    def _on_rank_zero(self, work: Callable[[], None]) -> str | None:
        problem = None
        if self._collective.rank == 0:
            try:
                work()
            except OSError as error:
                problem = f"{type(error).__name__}: {error}"
        shared: str | None = self._collective.share(problem)
        return shared

    def _first(self, problem: str | None) -> str | None:
        """Any rank's problem, on every rank."""
        if self._collective.sum([float(problem is not None)])[0] == 0:
            return None
        shared: str | None = self._collective.share(problem)
        return shared or problem or "another rank could not write its part"

    def _forget_old(self, newest: int) -> None:
        # One of a later step was broken, or training went back behind it: it is no part of this history, and would
        # take the place of one that is.
        undone = [path for step, path in found(self._folder) if step > newest]
        kept = [path for step, path in found(self._folder) if step <= newest][self._keep :]
        for path in [*undone, *kept, *self._folder.glob(".step-*.partial")]:
            shutil.rmtree(path, ignore_errors=True)


def load_weights(folder: Path, model: nn.Module) -> tuple[Path, tuple[Fault, ...]]:
    """Load the model's tensors alone, on one process: from the checkpoint ``folder``, or the newest whole one of the
    run in ``folder``. Its path, and those that were passed over.

    Raises ``CheckpointError`` when there is none, none is whole, or the model does not fit.
    """
    chosen, faults = choose(found_within(folder))
    if chosen is None:
        if faults:
            listed = "; ".join(f"{fault.path}: {fault.why}" for fault in faults)
            raise CheckpointError(f"no checkpoint under {folder} is whole ({listed}); name another checkpoint or run")
        raise CheckpointError(
            f"{folder} holds no checkpoint: name a folder such as runs/digits, or step-000000128 under its checkpoints"
        )
    try:
        model_state = get_model_state_dict(model)
        _refuse_another_model(chosen, _saved(chosen), model_state)
        _load({"model": model_state}, chosen, no_dist=True)
        set_model_state_dict(model, model_state)
    except CheckpointError:
        raise
    except (Exception, CheckpointException) as error:  # DCP raises several kinds, none of them narrow
        raise CheckpointError(
            f"checkpoint {chosen} does not fit this model: {_cause(error)}; name the config and use the code that "
            "wrote it"
        ) from error
    return chosen, faults


def load_tree(tree: dict[str, Any], path: Path) -> None:
    """Load into the tensors of ``tree``, on one process, what the checkpoint at ``path`` has under their names."""
    _load(tree, path, no_dist=True)


def _tree(model_state: Any, optimizer_state: Any, ema: Mapping[str, Tensor] | None) -> dict[str, Any]:
    """What is saved and loaded, as one tree."""
    tree = {"model": model_state, "optimizer": optimizer_state}
    return tree if ema is None else tree | {"ema": dict(ema)}


def _load(state: dict[str, Any], path: Path, *, no_dist: bool) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process: as meant
        state_dict_loader.load(
            state, storage_reader=CheckpointReader(path), planner=PlainDataPlanner(), no_dist=no_dist
        )


def _saved(path: Path) -> Mapping[str, Any]:
    """What the index says of all that the checkpoint holds, such as ``optimizer.state.0.weight.exp_avg``."""
    return CheckpointReader(path).read_metadata().state_dict_metadata


def _leave_out_unmoved(optimizer_state: Any, saved: Iterable[str]) -> None:
    """Take out of ``optimizer_state``, the template to load into, the parameters whose state was not there to save.

    A parameter that had no gradient in any step has no state yet, and torch makes one up for it in a template. Where
    nothing fits, and steps were taken, the checkpoint is of another optimizer: all stays, and DCP says what it misses.
    """
    template: dict[str, Any] = optimizer_state["state"]
    known = {prefix for name in saved for prefix in accumulate(name.split("."), "{}.{}".format)}
    unmoved = [parameter for parameter in template if f"optimizer.state.{parameter}" not in known]
    if len(unmoved) < len(template) or f"optimizer.{_UNMOVED}" in known:
        for parameter in unmoved:
            del template[parameter]


def _refuse_another_model(path: Path, saved: Mapping[str, Any], model_state: Mapping[str, Any]) -> None:
    difference = model_differences(saved, model_state)
    if difference is not None:
        raise CheckpointError(
            f"checkpoint {path} does not fit this model and optimizer: of the model's tensors {difference}; resume "
            "with the config and the code that wrote it, or begin a new run"
        )


def _cause(error: BaseException) -> str:
    """The first thing that went wrong: DCP hides it in its own exception, which is no ``Exception``, and its writer
    behind errors that follow from it."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    while not isinstance(error, OSError) and error.__context__ is not None:
        error = error.__context__
    return f"{type(error).__name__}: {error}"


def _make_empty(path: Path) -> None:
    """Not the run's folder as well: where that is gone, so may a network path be, and this is not its place."""
    shutil.rmtree(path, ignore_errors=True)
    path.parent.mkdir(exist_ok=True)
    path.mkdir()


def _commit(partial: Path, final_path: Path, meta: str) -> None:
    (partial / META).write_text(meta)
    write_manifest(partial)
    for file in partial.rglob("*"):
        if file.is_file():
            _sync(file)
    # A later attempt may save the same step again; the older one goes only once the new one is complete.
    if final_path.exists():
        shutil.rmtree(final_path)
    partial.rename(final_path)
    _sync(final_path.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
