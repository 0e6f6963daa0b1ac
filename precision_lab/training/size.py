"""How large a run is, and how many fit, told from shapes: nothing is compiled and nothing is allocated."""

import collections
import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from precision_lab import data, models
from precision_lab.models import DataSpec, ModelConfig
from precision_lab.nn import sites
from precision_lab.nn.storage import bytes_under
from precision_lab.policy import Policy
from precision_lab.policy.deriving import without_states
from precision_lab.training import AnyRun, ProbeRun, checkpointing
from precision_lab.training.program import program_for
from precision_lab.training.qat import learns_offsets
from precision_lab.training.rows import evaluates_at

_ROW_BYTES = 200
"""Of one row of metrics, about."""

_COPIES = 4
"""How many times its state a run needs: state, gradients, updates and the state after; activations come on top."""


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
    saves = min(train.steps, 1 + ((train.steps - 1) // train.checkpoint_every if train.checkpoint_every else 0))
    evaluations = sum(evaluates_at(train, step) for step in range(train.steps + 1)) * (2 + len(config.evals))
    rows = evaluations + train.steps // train.log_every
    return min(saves, checkpointing._KEPT) * state_bytes(config) + _ROW_BYTES * rows


def room_for(config: AnyRun) -> int:
    """Returns how many runs of a config fit at once into the memory that is available, estimated from their states."""
    return max(1, available_bytes() // max(1, _COPIES * state_bytes(config)))


def available_bytes() -> int:
    """Returns the memory that is available to arrays: of the first device, or of the machine if that is a CPU."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def bits_per_parameter(config: AnyRun) -> float | None:
    """Returns the true bits per parameter of a run's model, stored as `convert` stores it under the run's policy.

    Scales, zero points and padding count; what nothing but quantized products and lookups use is stored quantized, and
    the rest as the policy stores parameters. Learned scales count as others do. None for a probe, which has
    no model, and where parameters have offsets that are learned ("lsq+").
    """
    if isinstance(config, ProbeRun) or learns_offsets(config.policy):
        return None
    spec = config.data.spec() or data.load(config.data).spec
    return _bits(config.model, spec, config.policy)  # pyright: ignore[reportArgumentType] (frozen: hashable)


def _as_stored(policy: Policy, model: nnx.Module, example: jax.Array) -> Policy:
    """Returns a policy that stores as many bytes as one whose quantizers have learned.

    A parameter that learns a scale at each of several sites is stored as it is, having no one scale.
    """
    table = [site for site in sites(model, example, policy=policy) if site.has_parameter and site.treatment]
    used = collections.Counter(site.path for site in table)
    for site in table:
        by = [getattr(site.treatment, key) for key in site.quantized_by if key in ("weight", "embedding")]
        if used[site.path] > 1 and any(quantizer is not None and quantizer.has_state for quantizer in by):
            policy = policy.with_rule(site.path, weight=None, embedding=None)
    return without_states(policy)


@functools.lru_cache(maxsize=1024)
def _bits(model: ModelConfig, spec: DataSpec, policy: str) -> float:
    """Returns the bits of a model's parameters under a policy, over their number."""
    found: list[float] = []

    def trace() -> int:
        built = models.build(model, spec, 0)
        built.eval()
        dtype = jnp.float32 if spec.task == "classification" else jnp.int32
        example = jnp.zeros((2, *spec.input_shape), dtype)
        taken = bytes_under(built, _as_stored(Policy.parse(policy), built, example), None, (example,), {})
        count = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(nnx.state(built, nnx.Param)))
        found.append(8 * sum(taken.values()) / count)
        return 0

    jax.eval_shape(trace)  # Shapes are all that counts, so that a model of any size takes no memory.
    return found[0]
