"""Probes: measurements of one operation, run like a training: seeded, recorded, judged by claims.

    RunConfig trains a model; `ProbeRun` measures: {"probe": {"kind": "dot_product", "accum": "bfloat16"}, "seed": 0}

A probe is a config that names its metrics, and a function from the config and a seed to these metrics. Importing this
package needs no JAX.
"""

from precision_lab.training.probes.config import (
    PROBES,
    AnyProbe,
    DotProductConfig,
    LeastSquaresConfig,
    ProbeConfig,
    ProbeRun,
    RoundingErrorConfig,
    register_probe,
)

__all__ = [
    "PROBES",
    "AnyProbe",
    "DotProductConfig",
    "LeastSquaresConfig",
    "ProbeConfig",
    "ProbeRun",
    "RoundingErrorConfig",
    "register_probe",
]
