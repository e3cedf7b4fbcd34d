"""Which optimizers are like SGD, and which like Adam? It decides how their learning rate follows the batch.

The layer-wise and variance-reduced optimizers go with the one that they scale: lars with sgd; lamb and lans with adam,
as lamb's authors do (arXiv:1904.00962).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

Family = Literal["sgd", "adam"]

FAMILIES: Mapping[str, Family] = {
    "sgd": "sgd",
    "adam": "adam",
    "adamw": "adam",
    "lars": "sgd",
    "lamb": "adam",
    "lans": "adam",
    "clars": "sgd",
    "vr_sgd": "sgd",
    "vr_adam": "adam",
    "vr_lamb": "adam",
}

# Where noise dominates, the power of the batch that the learning rate's noise goes against: LR / B for SGD (Smith et
# al. 2018, arXiv:1711.00489), LR / sqrt(B) for normalised updates (Malladi et al. 2022, arXiv:2205.10287).
NOISE_EXPONENTS: Mapping[Family, float] = {"sgd": 1.0, "adam": 0.5}

# Those that weigh each coordinate of the gradient by Adam's second moments and by nothing else.
PRECONDITIONED_OPTIMIZERS = ("adam", "adamw")


def members(family: Family) -> tuple[str, ...]:
    """The optimizers of ``family``, in the table's order."""
    return tuple(name for name, of in FAMILIES.items() if of == family)
