# SPDX-License-Identifier: MIT
"""Linear recurrent networks as pure functions on dicts of tensors.

``from lrnnx_core import s5`` and then ``s5.init``, ``s5.scan``, ``s5.step``, ``s5.kernel``,
``s5.discretize``; `lrnnx_core.ops` has the operators under them, `lrnnx_core.registry` every model.
"""

from lrnnx_core import checks, discretize, events, frequency, initialize, ops, registry, sequences
from lrnnx_core.models import (
    centaurus,
    event_ssm,
    lru,
    mamba,
    mamba2,
    rglru,
    s4,
    s4d,
    s5,
    s7,
    stream,
)

__version__ = "0.1.0.dev0"
__all__ = [
    "centaurus",
    "checks",
    "citation",
    "discretize",
    "event_ssm",
    "events",
    "frequency",
    "initialize",
    "lru",
    "mamba",
    "mamba2",
    "ops",
    "registry",
    "rglru",
    "s4",
    "s4d",
    "s5",
    "s7",
    "sequences",
    "stream",
]


def citation(name: str) -> str:
    """Return the BibTeX entry of a model's paper.

    Raises:
        ValueError: no such model.
    """
    return registry.get(name).citation
