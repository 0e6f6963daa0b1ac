"""What a quantizer loses of random numbers, against float64."""

import jax
import jax.numpy as jnp
import numpy as np

from precision_lab.quant import fake_quantize
from precision_lab.training.probes.config import RoundingErrorConfig


def measure(config: RoundingErrorConfig, seed: int) -> dict[str, float]:
    """Returns "relative_mse", the sum of squared errors over the sum of squares, of `count` rows of `length` numbers.

    Runs of one seed, distribution and size measure the same numbers, whatever the quantizer.

    Source: Dettmers et al., "QLoRA", 2023, arXiv:2305.14314, section 3, for what NF4 is meant to be best at.
    """
    x = samples(config, seed)
    quantized = np.asarray(jax.jit(lambda x: fake_quantize(x, config.quantizer, axis=1))(x), np.float64)
    exact = np.asarray(x, np.float64)
    return {"relative_mse": float(np.sum((quantized - exact) ** 2) / np.sum(exact**2))}


def samples(config: RoundingErrorConfig, seed: int) -> jax.Array:
    """Returns the numbers, float32 (count, length)."""
    key, shape = jax.random.key(seed, impl="threefry2x32"), (config.count, config.length)
    if config.distribution == "uniform":
        return jax.random.uniform(key, shape, jnp.float32, -1.0, 1.0)
    return jax.random.normal(key, shape, jnp.float32)
