"""Which modules can be read sample by sample, and why not the others? Settled before anything starts."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from orchestrator.errors import MeasureError
from orchestrator.measure.layers import JOINED, RULES, WEIGHT_AND_BIAS, Rule


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Layer:
    """A module whose own trained ``parameters``, by name, are read with ``rule``."""

    path: str
    module: nn.Module
    rule: Rule
    parameters: Mapping[str, nn.Parameter]


@dataclass(frozen=True, slots=True, kw_only=True)
class Coverage:
    """What is measured, and what is trained besides; ``batch_norms`` are watched."""

    layers: tuple[Layer, ...]
    measured: tuple[nn.Parameter, ...]
    left_out: tuple[nn.Parameter, ...]
    batch_norms: Mapping[str, nn.Module]
    names: Mapping[int, str]  # of each trained parameter, by its id


def cover(
    model: nn.Module,
    trained: Iterable[nn.Parameter],
    *,
    leave_out: Sequence[str] = (),
    kinds: tuple[type[nn.Module], ...] = (nn.Module,),
) -> Coverage:
    """``leave_out`` are paths of modules, and ``kinds`` those that are measured where they lie elsewhere.

    Raises ``MeasureError``, which lists all modules that stand in the way, or paths that there are not.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    wanted = {id(p): p for p in trained if p.requires_grad}
    _refuse_unknown_paths(leave_out, modules)
    _refuse_compiled(modules)
    batch_norms = {path: module for path, module in modules.items() if isinstance(module, _BatchNorm)}
    refuse_mixing(batch_norms)
    layers, strange, seen = [], {}, set()
    for path, module in modules.items():
        own = {name: p for name, p in module.named_parameters(recurse=False) if id(p) in wanted}
        if not own or id(module) in seen or _is_below(path, leave_out) or not isinstance(module, kinds):
            continue
        seen.add(id(module))
        rule, why = _rule_of(module, own)
        if rule is None:
            strange[path] = why
        else:
            layers.append(Layer(path=path, module=module, rule=rule, parameters=own))
    if strange:
        raise MeasureError(_refusal(strange))
    covered = {id(p) for layer in layers for p in layer.parameters.values()}
    names = {id(p): name for name, p in model.named_parameters(remove_duplicate=False)}
    outside = [i for i in wanted if i not in names]
    if outside:
        raise MeasureError(
            f"{len(outside)} of the optimizer's parameters belong to no module of the model, so their gradients cannot "
            "be read sample by sample: make them part of the model, or write measure.estimator: micro_batch"
        )
    if not layers:
        raise MeasureError("measure.leave_out leaves nothing to measure: remove some of its paths")
    return Coverage(
        layers=tuple(layers),
        measured=tuple(p for i, p in wanted.items() if i in covered),
        left_out=tuple(p for i, p in wanted.items() if i not in covered),
        batch_norms=batch_norms,
        names=names,
    )


def refuse_mixing(batch_norms: Mapping[str, nn.Module]) -> None:
    """Raises ``MeasureError`` if one of them mixes the samples of its batch, as in training mode."""
    mixing = [path for path, module in batch_norms.items() if _mixes(module)]
    if mixing:
        raise MeasureError(
            f"BatchNorm in training mode at {_shown(mixing)}: every sample's gradient then depends on the others of "
            "its micro-batch, so that gradients of single samples are not defined, and measure.leave_out does not "
            "help; write measure.estimator: micro_batch, or use GroupNorm, or put those layers into evaluation mode "
            "and freeze their parameters or leave them out"
        )


def joined_names(layer: Layer, *, shared: set[int]) -> tuple[str, ...]:
    """The names to ask the rule for: weight and bias as one where that is possible and neither is in ``shared``."""
    names = tuple(layer.parameters)
    together = set(names) == {"weight", "bias"} and isinstance(layer.module, JOINED)
    if together and not shared & {id(p) for p in layer.parameters.values()}:
        return (WEIGHT_AND_BIAS,)
    return names


def _rule_of(module: nn.Module, own: Mapping[str, nn.Parameter]) -> tuple[Rule | None, str]:
    """The rule, or why there is none."""
    known = next((kind for kind in RULES if isinstance(module, kind)), None)
    if known is None:
        return None, f"no rule for it (its own parameters: {', '.join(own)})"
    if type(module).forward is not known.forward or not set(own) <= {"weight", "bias"}:
        return None, f"differs from {known.__name__} in its forward or its parameters"
    if isinstance(module, (nn.Conv1d, nn.Conv2d)) and type(module)._conv_forward is not known._conv_forward:  # type: ignore[attr-defined]
        return None, f"differs from {known.__name__} in how it convolves"
    if isinstance(module, nn.Embedding) and module.scale_grad_by_freq:
        return None, "scale_grad_by_freq divides by counts over the whole micro-batch, which mixes its samples"
    if isinstance(module, nn.Embedding) and module.sparse:
        return None, "its gradient is sparse; write sparse=False"
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return None, "max_norm changes the weights in the forward pass"
    return RULES[known], ""


def _refusal(strange: Mapping[str, str]) -> str:
    known = ", ".join(kind.__name__ for kind in RULES)
    lines = [f"  {path or 'the model itself'}: {why}" for path, why in strange.items()]
    paths = ", ".join(path or '""' for path in strange)
    return "\n".join(
        [
            "measure.estimator reads gradients sample by sample, and cannot in these modules:",
            *lines,
            f"  It knows {known}, and parameters in a module of these kinds. Put the parameters into such modules, or "
            f"leave the modules out (measure.leave_out: [{paths}]), or write "
            "measure.estimator: micro_batch",
        ]
    )


def _refuse_unknown_paths(leave_out: Sequence[str], modules: Mapping[str, nn.Module]) -> None:
    for path in leave_out:
        if path not in modules:
            close = difflib.get_close_matches(path, modules, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise MeasureError(f"measure.leave_out: the model has no module {path!r}{hint}")


def _refuse_compiled(modules: Mapping[str, nn.Module]) -> None:
    compiled = [path for path, m in modules.items() if hasattr(m, "_orig_mod") or m._compiled_call_impl is not None]
    if compiled:
        raise MeasureError(
            f"torch.compile at {_shown(compiled)}: compiled code passes over hooks that come and go, and so over what "
            "is to be read; train the model as it is, or write measure.estimator: micro_batch, whose hooks sit on the "
            "parameters, outside the compiled code"
        )


def _is_below(path: str, left_out: Sequence[str]) -> bool:
    return any(path == top or path.startswith(f"{top}.") for top in left_out)


def _mixes(module: nn.Module) -> bool:
    return module.training or getattr(module, "running_mean", None) is None


def _shown(paths: Sequence[str]) -> str:
    return ", ".join(path or "the model itself" for path in paths)
