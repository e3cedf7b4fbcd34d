"""What is the gradient of each sample, for each kind of layer? From its input and the gradient at its output.

A rule is ``rule(module, inputs, deltas, wanted) -> {parameter's name: its gradients}``, for the names ``wanted``;
samples lie along the first dimension of both tensors, which are float32 or float64. Formulas: Goodfellow 2015
(arXiv:1510.01799) for linear layers, Rochette et al. 2019 (arXiv:1912.06015) for convolutions, Gray et al. 2024
(arXiv:2411.00999) for normalisation; derived again here and tested against one backward pass a sample.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from math import prod
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from orchestrator.measure.example_norms import ExampleGradients, Formed, Lookup, Outer

WEIGHT_AND_BIAS = "weight and bias"
"""Names a weight's and a bias's gradients as one, where neither is used elsewhere: the bias then costs nothing."""

Rule = Callable[[Any, Tensor, Tensor, Collection[str]], dict[str, ExampleGradients]]


def linear(module: nn.Linear, inputs: Tensor, deltas: Tensor, wanted: Collection[str]) -> dict[str, ExampleGradients]:
    """Inputs [n, ..., in], deltas [n, ..., out]: all that lies between is summed over."""
    rows = deltas.reshape(len(deltas), 1, -1, module.out_features)
    found: dict[str, ExampleGradients] = {}
    if "bias" in wanted:
        found["bias"] = Formed(rows.sum((1, 2)))
    for name in {"weight", WEIGHT_AND_BIAS} & set(wanted):
        columns = inputs.reshape(len(inputs), 1, -1, module.in_features)
        found[name] = Outer(rows, columns, bias=name == WEIGHT_AND_BIAS)
    return found


def convolution(
    module: nn.Conv1d | nn.Conv2d, inputs: Tensor, deltas: Tensor, wanted: Collection[str]
) -> dict[str, ExampleGradients]:
    """A linear layer over the patches of the padded input, group by group. Inputs [n, c, (h,) w]."""
    n, g = len(deltas), module.groups
    found: dict[str, ExampleGradients] = {}
    if "bias" in wanted:
        found["bias"] = Formed(deltas.flatten(2).sum(2))
    for name in {"weight", WEIGHT_AND_BIAS} & set(wanted):
        patches = _patches(module, inputs)
        rows = deltas.reshape(n, g, module.out_channels // g, -1).mT
        columns = patches.reshape(n, g, patches.shape[1] // g, -1).mT
        found[name] = Outer(rows, columns, bias=name == WEIGHT_AND_BIAS)
    return found


def embedding(
    module: nn.Embedding, inputs: Tensor, deltas: Tensor, wanted: Collection[str]
) -> dict[str, ExampleGradients]:
    """Inputs are ids [n, ...]; positions that hold ``padding_idx`` get no gradient."""
    ids = inputs.reshape(len(inputs), -1)
    values = deltas.reshape(*ids.shape, module.embedding_dim)
    if module.padding_idx is not None:
        values = values * (ids != module.padding_idx).unsqueeze(2)
    return {"weight": Lookup(ids, values, module.num_embeddings)}


def layer_norm(
    module: nn.LayerNorm, inputs: Tensor, deltas: Tensor, wanted: Collection[str]
) -> dict[str, ExampleGradients]:
    shape = list(module.normalized_shape)
    return _gain_and_shift(
        lambda: functional.layer_norm(inputs, shape, eps=module.eps), deltas, wanted, count=prod(shape)
    )


def rms_norm(
    module: nn.RMSNorm, inputs: Tensor, deltas: Tensor, wanted: Collection[str]
) -> dict[str, ExampleGradients]:
    shape = list(module.normalized_shape)
    return _gain_and_shift(
        lambda: functional.rms_norm(inputs, shape, eps=module.eps), deltas, wanted, count=prod(shape)
    )


def group_norm(
    module: nn.GroupNorm, inputs: Tensor, deltas: Tensor, wanted: Collection[str]
) -> dict[str, ExampleGradients]:
    """Inputs [n, c, ...]: a gain and a shift a channel."""
    found: dict[str, ExampleGradients] = {}
    if "weight" in wanted:
        found["weight"] = Formed(
            (deltas * functional.group_norm(inputs, module.num_groups, eps=module.eps)).flatten(2).sum(2)
        )
    if "bias" in wanted:
        found["bias"] = Formed(deltas.flatten(2).sum(2))
    return found


RULES: Mapping[type[nn.Module], Rule] = {
    nn.Linear: linear,
    nn.Conv1d: convolution,
    nn.Conv2d: convolution,
    nn.Embedding: embedding,
    nn.LayerNorm: layer_norm,
    nn.RMSNorm: rms_norm,
    nn.GroupNorm: group_norm,
}
NORMALISATION = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)
JOINED = (nn.Linear, nn.Conv1d, nn.Conv2d)  # these know WEIGHT_AND_BIAS


def has_samples(module: nn.Module, deltas: Tensor) -> bool:
    """Whether the output has a dimension before those that the layer itself works on."""
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        return deltas.dim() > len(module.normalized_shape)
    return deltas.dim() > (1 + len(module.kernel_size) if isinstance(module, (nn.Conv1d, nn.Conv2d)) else 1)


def _gain_and_shift(
    normalised: Callable[[], Tensor], deltas: Tensor, wanted: Collection[str], *, count: int
) -> dict[str, ExampleGradients]:
    """Over the last dimensions, which have ``count`` numbers; summed over those between them and the samples."""
    found: dict[str, ExampleGradients] = {}
    if "weight" in wanted:
        found["weight"] = Formed((deltas * normalised()).reshape(len(deltas), -1, count).sum(1))
    if "bias" in wanted:
        found["bias"] = Formed(deltas.reshape(len(deltas), -1, count).sum(1))
    return found


def _patches(module: nn.Conv1d | nn.Conv2d, inputs: Tensor) -> Tensor:
    """What each output position sees: [n, channels x kernel, positions], channels first."""
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    around = _padding(module)
    padded = functional.pad(inputs, around, mode=mode) if any(around) else inputs
    flat = isinstance(module, nn.Conv1d)
    one = (1,) if flat else ()  # a signal is an image of one row
    if all(size == 1 for size in (*module.kernel_size, *module.stride)):
        return padded.flatten(2)
    return functional.unfold(
        padded.unsqueeze(2) if flat else padded,
        kernel_size=one + module.kernel_size,
        dilation=one + module.dilation,
        stride=one + module.stride,
    )


def _padding(module: nn.Conv1d | nn.Conv2d) -> list[int]:
    """Of the last dimension first, before and after, as ``functional.pad`` takes it."""
    around = []
    for i in reversed(range(len(module.kernel_size))):
        if module.padding == "valid":
            around += [0, 0]
        elif module.padding == "same":  # the odd one goes behind
            both = module.dilation[i] * (module.kernel_size[i] - 1)
            around += [both // 2, both - both // 2]
        else:
            around += [int(module.padding[i])] * 2
    return around
