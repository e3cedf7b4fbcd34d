"""What a task is: the model, the data, the loss and the metrics of one thing to train; and what is refused, and why.

A task of one's own is ``module:factory`` in the config; the factory gets ``task.options`` by name, and ``seed`` if it
has a parameter of that name.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.utils.data import DataLoader, IterableDataset, Sampler, default_collate

from orchestrator.errors import TaskError
from orchestrator.registry import resolve

BUILT_IN = {"digits": "orchestrator.tasks.digits:digits", "char_lm": "orchestrator.tasks.char_lm:char_lm"}
_NOT_BUILT = object()  # None is what a model() without a return statement gives


class MapDataset(Protocol):
    """Any data set of known length that gives its samples by index: ``torch.utils.data.Dataset``, a list, a tensor."""

    def __len__(self) -> int:
        """How many samples there are: at least one, the same on every rank."""
        ...

    def __getitem__(self, index: int, /) -> Any:
        """Sample ``index``, of 0 to ``len - 1``; called in any order, on any rank, perhaps in a loader process."""
        ...


class Task(Protocol):
    """What is trained.

    A task may also have ``collate(samples: list) -> batch``; without it ``torch.utils.data.default_collate`` is used.
    A batch is any nest of tuples, lists, mappings and dataclasses of tensors; it is moved to the model's device.
    """

    @property
    def train_set(self) -> MapDataset:
        """What is learned from."""
        ...

    @property
    def eval_set(self) -> MapDataset:
        """What is held out, and only ever evaluated."""
        ...

    def model(self) -> nn.Module:
        """A new model. Called right after ``torch.manual_seed``, with the same seed on every rank."""
        ...

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """The mean of the loss over the samples of ``batch``: a scalar that carries a gradient.

        A mean, not a sum: the gradients of micro-batches are weighted by their samples afterwards. A mean over
        anything else, such as the tokens of sequences of different length, is weighted wrongly.
        """
        ...

    def metrics(self, model: nn.Module, batch: Any) -> Mapping[str, Tensor | float]:
        """Scalars, each a mean over the samples of ``batch``; called in evaluation mode, without gradients.

        Over the held-out set they are averaged weighted by samples, so a metric that is no mean has no place here.
        """
        ...


def build_task(name: str, options: Mapping[str, Any] | None = None, *, seed: int = 0) -> Task:
    """The task called ``name``: a built-in one, or ``package.module:factory``. Raises ``TaskError``."""
    factory = _find(name)
    given = dict(options or {})
    try:
        signature = inspect.signature(factory)
    except (TypeError, ValueError):  # some callables written in C tell nothing; they are called and judged by that
        signature = None
    if signature is not None:
        given = _fitting(name, signature, given, seed=seed)
    try:
        task = factory(**given)
    except TaskError:
        raise
    except Exception as error:
        raise TaskError(f"task {name}: its factory raised {type(error).__name__}: {error}") from error
    try:
        _check_parts(task)
    except TaskError as error:
        raise TaskError(f"task {name}: {error}") from error
    return task


def collate_of(task: Task) -> Callable[[list[Any]], Any]:
    """What makes a batch of a list of the task's samples."""
    collate: Callable[[list[Any]], Any] = getattr(task, "collate", None) or default_collate
    return collate


def check_task(task: Any, model: Any = _NOT_BUILT) -> None:
    """Raise ``TaskError`` for what is no ``Task``, or does not fit yet; for its ``model`` too, once it was built."""
    _check_parts(task)
    if model is not _NOT_BUILT:
        check_model(model)


def check_model(model: Any) -> None:
    """Raise ``TaskError`` unless ``model`` is one module with parameters that can be trained."""
    if not isinstance(model, nn.Module):
        more = "; several networks with optimizers of their own do not fit" if isinstance(model, (list, tuple)) else ""
        raise TaskError(f"model() must return one torch.nn.Module, and returned {_kind(model)}{more}")
    parameters = list(model.parameters())
    if any(isinstance(p, UninitializedParameter) for p in parameters):
        raise TaskError(
            f"model {_kind(model)} has lazy parameters without a shape yet, so ranks cannot begin alike; run one batch "
            "through it in model(), or give its layers their sizes"
        )
    if not any(p.requires_grad for p in parameters):
        what = "only parameters with requires_grad=False" if parameters else "no parameters"
        raise TaskError(f"model {_kind(model)} has {what}, so there is nothing to train; assign its layers to self")


def check_dataset(dataset: Any, *, name: str = "dataset") -> None:
    """Raise ``TaskError`` unless ``dataset`` can be read by index, any index at any time, and is not empty.

    Any sample may be asked of any rank: that is what keeps every sample used exactly once while the batch and the
    number of workers change.
    """
    refusal = _why_not(dataset)
    if refusal is not None:
        raise TaskError(f"{name}: {refusal}")
    try:
        size = len(dataset)
    except (TypeError, NotImplementedError, AttributeError) as error:
        raise TaskError(
            f"{name}: {_kind(dataset)} has no length; a map-style data set with __len__ and __getitem__ is needed"
        ) from error
    if size < 1:
        raise TaskError(f"{name}: {_kind(dataset)} is empty; look at the path or the filter that it is read with")


def _check_parts(task: Any) -> None:
    for method in ("model", "loss", "metrics"):
        if not callable(getattr(task, method, None)):
            raise TaskError(f"{_kind(task)} has no method {method}(): a task needs model(), loss() and metrics()")
    for name in ("train_set", "eval_set"):
        if not hasattr(task, name):
            raise TaskError(
                f"{_kind(task)} has no {name}: a task needs train_set and eval_set, both map-style data sets"
            )
        check_dataset(getattr(task, name), name=name)
    collate = getattr(task, "collate", None)
    if collate is not None and not callable(collate):
        raise TaskError(f"collate must be callable with a list of samples, and is {_kind(collate)}; or leave it out")
    optimizers = getattr(task, "optimizers", None)
    if hasattr(task, "configure_optimizers") or (
        isinstance(optimizers, (list, tuple, Mapping)) and len(optimizers) > 1
    ):
        raise TaskError(
            f"{_kind(task)} brings its own optimizers: one optimizer is built from the config's optimizer section, and "
            "the noise scale is that of one loss, so two that alternate, as in a GAN, do not fit; remove "
            "optimizers / configure_optimizers, and train one network"
        )


def _why_not(dataset: Any) -> str | None:
    by_index = "samples are asked for by index, so that each is used exactly once while batch and workers change"
    if dataset is None or isinstance(dataset, type):
        return f"a map-style data set with __len__ and __getitem__ is needed, and this is {dataset!r}"
    if isinstance(dataset, DataLoader):
        return (
            "this is a DataLoader, which cuts its batches itself; give the data set inside it (loader.dataset), its "
            "collate_fn as the collate function, and its num_workers as data.loader_workers"
        )
    if isinstance(dataset, Sampler):
        return (
            f"this is a sampler ({_kind(dataset)}), and samplers of one's own do not fit yet: {by_index}; give the "
            "data set, and for a weighted or filtered choice torch.utils.data.Subset with the chosen indices"
        )
    if any(base.__module__.startswith("ray.data") for base in type(dataset).__mro__):
        return (
            f"this is Ray Data ({_kind(dataset)}), which streams blocks and does not fit yet: {by_index}; give a "
            "map-style data set over the same files"
        )
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__"):
        what = "an iterable data set" if hasattr(dataset, "__iter__") else "not a data set"
        return (
            f"{_kind(dataset)} is {what}, and these do not fit yet: {by_index}; give a map-style one with __len__ and "
            "__getitem__, such as list(samples) where they fit in memory"
        )
    if isinstance(dataset, (Mapping, str, bytes)):
        return (
            f"{_kind(dataset)} does not give samples by the indices 0, 1, 2 ...; of a mapping of splits, choose one, "
            "such as splits['train']"
        )
    return None


def _find(name: str) -> Callable[..., Any]:
    try:
        # Built-in tasks are names of import paths, so that only the one that is wanted is imported.
        found = resolve(BUILT_IN.get(name, name), BUILT_IN, kind="task")
    except ValueError as error:
        raise TaskError(str(error)) from error
    except Exception as error:
        raise TaskError(f"task {name}: importing it raised {type(error).__name__}: {error}") from error
    if not callable(found):
        raise TaskError(f"task {name} is {_kind(found)}; it must be callable and return a task")
    factory: Callable[..., Any] = found
    return factory


def _fitting(name: str, signature: inspect.Signature, given: dict[str, Any], *, seed: int) -> dict[str, Any]:
    """``given``, with the seed where it is wanted. Raises ``TaskError`` for options that the factory does not know."""
    parameters = list(signature.parameters.values())
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    known = [p.name for p in parameters if p.kind in by_name]
    if "seed" in known:
        given = {"seed": seed, **given}
    options = ", ".join(k for k in known if k != "seed") or "none"
    if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        for key in sorted(given.keys() - set(known)):
            guess = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {guess[0]}?" if guess else ""
            raise TaskError(f"task {name} has no option {key!r}{hint} (its options: {options})")
    try:
        signature.bind(**given)
    except TypeError as error:
        raise TaskError(f"task {name}: {error} in task.options (its options: {options})") from error
    return given


def _kind(value: Any) -> str:
    kind = type(value)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
