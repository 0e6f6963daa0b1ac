"""Building a model from its config."""

from typing import Any

import jax
from flax import nnx

from precision_lab.models.config import MODELS, DataSpec, ModelConfig


def build(config: ModelConfig, spec: DataSpec, seed: Any) -> nnx.Module:
    """Returns the model that `config` describes, for data of `spec`, initialised from `seed` alone.

    Args:
      config: model config of any registered kind.
      spec: what the data asks of the model.
      seed: integer, which may be traced: the initialisation can run under jit.

    Raises:
      ValueError: the model cannot learn such data.
    """
    config.check(spec)
    return MODELS.builder(config)(config, spec, nnx.Rngs(jax.random.key(seed)))
