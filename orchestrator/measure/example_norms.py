"""The gradient of every single sample with respect to one parameter, kept in factors, and its squared norm.

With a = the layer's input and d = the gradient that arrives at its output, the gradient of sample i is a sum of outer
products over the positions t of the sample, sum_t d_t a_t^T. Its squared norm needs no such matrix: it is
sum_{t,s} (d_t . d_s)(a_t . a_s), for one position |d|^2 |a|^2 (Goodfellow 2015, arXiv:1510.01799). Where a matrix of
all pairs of positions would cost more than the gradient itself, the gradient is formed.

Shapes: n samples, g groups that do not mix (1 but for grouped convolutions), t positions, then features. Everything
is in the units of the backward pass that was run: the gradient of sample i is its part of the micro-batch's gradient,
so that all of them add up to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

_MOST_FORMED = 2**24  # numbers of per-sample gradients held at once


@final
@dataclass(frozen=True, slots=True)
class Formed:
    """The gradients as they are: ``values`` [n, ...], flattened, in the parameter's order."""

    values: Tensor

    def squared_norms(self) -> Tensor:
        """|gradient of sample i|^2, [n]."""
        return _squares(self.values)

    def total(self) -> Tensor:
        """Their sum over the samples, flat."""
        return self.values.sum(0).flatten()

    def formed(self) -> Formed:
        return self


@final
@dataclass(frozen=True, slots=True)
class Outer:
    """sum_t rows_t columns_t^T: a weight [g x r, c] with ``rows`` [n, g, t, r] and ``columns`` [n, g, t, c].

    With ``bias`` the column of ones is meant besides: the gradients of a weight and of its bias as one.
    """

    rows: Tensor
    columns: Tensor
    bias: bool = False

    def squared_norms(self) -> Tensor:
        t, r, c = *self.rows.shape[2:], self.columns.shape[3]
        if t == 1:
            return (_pairs(self.rows) * self._with_ones(_pairs(self.columns))).sum(1)
        if t * (r + c) <= r * c:
            return _inner(_gram(self.rows), self._with_ones(_gram(self.columns)))
        whole = torch.cat([_squares(part) for part in self._gradients()])
        return whole + _squares(self.rows.sum(2)) if self.bias else whole

    def total(self) -> Tensor:
        return torch.einsum("ngtr,ngtc->grc", self.rows, self.columns).flatten()

    def formed(self) -> Formed:
        return Formed(torch.cat(list(self._gradients())).flatten(1))

    def _gradients(self) -> list[Tensor]:
        """[some samples, g, r, c] at a time."""
        each = self.rows.shape[1] * self.rows.shape[3] * self.columns.shape[3]
        some = max(1, _MOST_FORMED // each)
        return [a.mT @ b for a, b in zip(self.rows.split(some), self.columns.split(some), strict=True)]

    def _with_ones(self, products: Tensor) -> Tensor:
        return products + 1 if self.bias else products


@final
@dataclass(frozen=True, slots=True)
class Lookup:
    """sum_t e_{ids_t} values_t^T: a table [rows, c] with ``ids`` [n, t] and ``values`` [n, t, c]."""

    ids: Tensor
    values: Tensor
    num_rows: int

    def squared_norms(self) -> Tensor:
        same = self.ids.unsqueeze(2) == self.ids.unsqueeze(1)
        return _inner(_gram(self.values), same.to(self.values.dtype))

    def total(self) -> Tensor:
        table = self.values.new_zeros(self.num_rows, self.values.shape[-1])
        return table.index_add_(0, self.ids.flatten(), self.values.flatten(0, 1)).flatten()

    def formed(self) -> Formed:
        n, _, c = self.values.shape
        tables = self.values.new_zeros(n, self.num_rows, c)
        return Formed(tables.scatter_add_(1, self.ids.unsqueeze(2).expand_as(self.values), self.values).flatten(1))


ExampleGradients = Formed | Outer | Lookup


def squared_norms(uses: Sequence[ExampleGradients]) -> Tensor:
    """[n]: |sum over ``uses`` of one parameter|^2 for each sample, with the cross terms between uses.

    Uses of one kind are one use of more positions. A table that is looked up in and multiplied by, as an embedding
    tied to the output layer is, has the cross term 2 sum_{t,s} rows_t[ids_s] (columns_t . values_s).
    """
    outer = [use for use in uses if isinstance(use, Outer)]
    lookups = [use for use in uses if isinstance(use, Lookup)]
    alike = len({use.rows.shape[1] for use in outer}) <= 1
    if len(outer) + len(lookups) < len(uses) or not alike:
        return _squares(sum((use.formed().values.flatten(1) for use in uses[1:]), uses[0].formed().values.flatten(1)))
    joined: list[Outer | Lookup] = []
    if outer:
        joined.append(Outer(torch.cat([use.rows for use in outer], 2), torch.cat([use.columns for use in outer], 2)))
    if lookups:
        ids, values = torch.cat([use.ids for use in lookups], 1), torch.cat([use.values for use in lookups], 1)
        joined.append(Lookup(ids, values, lookups[0].num_rows))
    own = sum((use.squared_norms() for use in joined[1:]), joined[0].squared_norms())
    if len(joined) == 1:
        return own
    product, table = joined
    assert isinstance(product, Outer)
    assert isinstance(table, Lookup)
    rows, columns = product.rows.squeeze(1), product.columns.squeeze(1)
    picked = rows.gather(2, table.ids.unsqueeze(1).expand(-1, rows.shape[1], -1))
    return own + 2 * _inner(picked, columns @ table.values.mT)


def _gram(vectors: Tensor) -> Tensor:
    """[..., t, t] of ``vectors`` [..., t, c]."""
    return vectors @ vectors.mT


def _pairs(vectors: Tensor) -> Tensor:
    """|vector|^2 [n, g] of ``vectors`` [n, g, 1, c]."""
    return vectors.square().sum((2, 3))


def _inner(one: Tensor, other: Tensor) -> Tensor:
    """Sum of products over all but the first dimension, [n]."""
    return (one * other).flatten(1).sum(1)


def _squares(values: Tensor) -> Tensor:
    return values.square().flatten(1).sum(1)
