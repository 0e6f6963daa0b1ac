"""What an update rule of 16-bit weights makes of least squares, where the right weights are known."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from precision_lab.optim import kahan, master_weights, nearest_rounding, stochastic_rounding
from precision_lab.training.probes.config import LeastSquaresConfig

_WEIGHTS, _DATA, _ROUNDING = range(3)  # streams of random numbers
_LARGEST = 100.0


def measure(config: LeastSquaresConfig, seed: int) -> dict[str, float]:
    """Returns how far SGD ends from the weights that made the data.

    A teacher has weights U(0, 100); inputs are N(0, 1), targets have noise, and every batch is new. A student that
    starts at zero minimises half the mean squared error. Gradients are float32, so that nothing but the update is
    rounded. Runs of one seed see the same data, whatever the rule.

    Returns:
      "error", the squared distance of the student's weights, as they are stored, from the teacher's; and
      "unchanged_fraction", the share of weights that a step left bit-identical, over all steps.

    Source: Zamirai et al., "Revisiting BFloat16 Training", 2020, arXiv:2010.06192, section 3 (least squares as the
      model of what rounding to nearest does to weight updates).
    """
    teacher, inputs, targets = data(config, seed)
    key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), _ROUNDING)
    weights, unchanged = _trained(config, inputs, targets, key)
    error = np.sum((np.asarray(weights, np.float64) - np.asarray(teacher, np.float64)) ** 2)
    return {"error": float(error), "unchanged_fraction": float(unchanged)}


def data(config: LeastSquaresConfig, seed: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the teacher's weights (dimension,), inputs (steps, batch, dimension) and targets (steps, batch)."""
    root = jax.random.key(seed, impl="threefry2x32")
    teacher = _LARGEST * jax.random.uniform(jax.random.fold_in(root, _WEIGHTS), (config.dimension,), jnp.float32)
    shape = (config.steps, config.batch, config.dimension + 1)
    drawn = jax.random.normal(jax.random.fold_in(root, _DATA), shape, jnp.float32)
    inputs, noise = drawn[..., :-1], drawn[..., -1]
    return teacher, inputs, jnp.einsum("sbd,d->sb", inputs, teacher, precision="highest") + config.noise * noise


@functools.partial(jax.jit, static_argnums=0)
def _trained(config: LeastSquaresConfig, inputs: jax.Array, targets: jax.Array, key: jax.Array) -> tuple[Any, Any]:
    """Returns the student's weights after all steps, and the share of weights that a step left alone."""
    stored = jnp.float32 if config.update == "float32" else jnp.dtype(config.format)
    tx, start = _optimizer(config, key), jnp.zeros(config.dimension, stored)

    def step(carry: Any, batch: Any) -> Any:
        weights, state = carry
        x, y = batch
        wrong = jnp.einsum("bd,d->b", x, weights.astype(jnp.float32), precision="highest") - y
        gradient = jnp.einsum("bd,b->d", x, wrong, precision="highest") / config.batch
        updates, state = tx.update(gradient, state, weights)
        after = optax.apply_updates(weights, updates)
        return (after, state), jnp.mean(after == weights)

    (weights, _), unchanged = jax.lax.scan(step, (start, tx.init(start)), (inputs, targets))
    return weights, jnp.mean(unchanged)


def _optimizer(config: LeastSquaresConfig, key: jax.Array) -> optax.GradientTransformation:
    """Returns SGD under the update rule."""
    sgd = optax.sgd(config.lr)
    match config.update:
        case "master":
            return master_weights(sgd)
        case "stochastic":
            return stochastic_rounding(sgd, key)
        case "kahan":
            return kahan(sgd)
        case "nearest":
            return nearest_rounding(sgd)
    return sgd
