"""Optimizers for large batches: each layer, that is each parameter tensor, moves by a share of its own norm.

CLARS and VR-LAMB compare the parts of a batch besides, VR-SGD and VR-Adam do that alone: ``orchestrator.optim.parts``.

Written here because the published packages at hand divide where they should multiply, clamp what no formula clamps,
or begin their momentum with another quantity; the tests hold these to the formulas.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from orchestrator.optim.clars import CLARS
from orchestrator.optim.lamb import LAMB
from orchestrator.optim.lans import LANS
from orchestrator.optim.lars import LARS
from orchestrator.optim.parts import PartsOptimizer
from orchestrator.optim.vr_adam import VRLAMB, VRAdam
from orchestrator.optim.vr_sgd import VRSGD

OPTIMIZERS: Mapping[str, type[torch.optim.Optimizer]] = {
    "lars": LARS,
    "lamb": LAMB,
    "lans": LANS,
    "clars": CLARS,
    "vr_sgd": VRSGD,
    "vr_adam": VRAdam,
    "vr_lamb": VRLAMB,
}

__all__ = ["CLARS", "LAMB", "LANS", "LARS", "OPTIMIZERS", "VRLAMB", "VRSGD", "PartsOptimizer", "VRAdam"]
