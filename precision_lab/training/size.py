"""How large a run is, told from shapes: nothing is compiled and nothing is allocated."""

import jax

from precision_lab import data
from precision_lab.training import AnyRun, ProbeRun, checkpointing
from precision_lab.training.program import program_for

_ROW_BYTES = 200
"""Of one row of metrics, about."""


def state_bytes(config: AnyRun) -> int:
    """Returns the bytes of a run's train state: parameters, other variables, optimizer state; a probe has none."""
    if isinstance(config, ProbeRun):
        return 0
    spec = config.data.spec() or data.load(config.data).spec
    leaves = jax.tree.leaves(program_for(config, spec).state_shapes)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


def disk_bytes(config: AnyRun) -> int:
    """Returns about how many bytes a finished run leaves on disk: its checkpoints and its record."""
    if isinstance(config, ProbeRun):
        return _ROW_BYTES
    train = config.train
    saves = 1 + ((train.steps - 1) // train.checkpoint_every if train.checkpoint_every else 0)
    evaluations = 2 * (2 + (train.steps // train.eval_every if train.eval_every else 0))
    rows = evaluations + train.steps // train.log_every
    return min(saves, checkpointing._KEPT) * state_bytes(config) + _ROW_BYTES * rows
