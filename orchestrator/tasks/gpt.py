"""A small GPT-style language model: pre-norm transformer blocks over learned positions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn
from torch.nn import functional

_INIT_DEVIATION = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class GPTShape:
    """``context``: the most characters that are looked back on; ``width`` is shared out among the ``heads``."""

    vocabulary: int
    context: int
    width: int
    depth: int
    heads: int
    dropout: float  # fraction


@final
class GPT(nn.Module):
    """Scores [n, t, vocabulary] of the next token after each of ``tokens`` [n, t], t at most ``context``.

    Radford et al. 2019; projections into the residual stream begin smaller by sqrt(2 depth).
    """

    def __init__(self, shape: GPTShape) -> None:
        super().__init__()
        # A layer, and looked up for each sample, though all have the same: so the gradient of each can be told.
        self.positions = nn.Embedding.from_pretrained(torch.empty(shape.context, shape.width), freeze=False)
        self.tokens = nn.Embedding(shape.vocabulary, shape.width)
        self.dropout = nn.Dropout(shape.dropout)
        self.blocks = nn.ModuleList(_Block(shape) for _ in range(shape.depth))
        self.norm = nn.LayerNorm(shape.width)
        self.scores = nn.Linear(shape.width, shape.vocabulary, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                into_stream = name.endswith(("attended.weight", "down.weight"))
                deviation = _INIT_DEVIATION * ((2 * shape.depth) ** -0.5 if into_stream else 1.0)
                nn.init.normal_(parameter, std=deviation)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        x = self.dropout(self.tokens(tokens) + self.positions(places))
        for block in self.blocks:
            x = block(x)
        scores: Tensor = self.scores(self.norm(x))
        return scores


@final
class _Block(nn.Module):
    def __init__(self, shape: GPTShape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.dropout = shape.dropout
        self.before_attention = nn.LayerNorm(shape.width)
        self.query_key_value = nn.Linear(shape.width, 3 * shape.width)
        self.attended = nn.Linear(shape.width, shape.width)
        self.before_mlp = nn.LayerNorm(shape.width)
        self.up = nn.Linear(shape.width, 4 * shape.width)
        self.down = nn.Linear(4 * shape.width, shape.width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self._dropped(self._attention(self.before_attention(x)))
        # ReLU and not GELU: on a CPU core GELU alone took a quarter of the step, for the same curve.
        return x + self._dropped(self.down(functional.relu(self.up(self.before_mlp(x)))))

    def _attention(self, x: Tensor) -> Tensor:
        n, t, width = x.shape
        query, key, value = (
            self.query_key_value(x).view(n, t, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        )
        dropout = self.dropout if self.training else 0.0
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True, dropout_p=dropout)
        joined: Tensor = self.attended(mixed.transpose(1, 2).reshape(n, t, width))
        return joined

    def _dropped(self, x: Tensor) -> Tensor:
        return functional.dropout(x, self.dropout, self.training)
