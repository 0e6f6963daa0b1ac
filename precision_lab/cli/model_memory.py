"""What a model of the project has to keep: its parameters, and its activations under a policy; from shapes alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from precision_lab.data.config import DATASETS
from precision_lab.models.config import MODELS, DataSpec, ModelConfig


@dataclass(frozen=True)
class Described:
    """A model and the data it is for.

    Attributes:
      config: the model's config.
      spec: what the data asks of it.
      data: name of the data.
    """

    config: ModelConfig
    spec: DataSpec
    data: str


def parse_model(text: str) -> Described:
    """Returns the model that "transformer" or "transformer:width=256,depth=4" describes.

    The data is the first kind that such a model can learn: digits, or tinyshakespeare for language models.

    Raises:
      ValueError: an unknown kind or size, or no data for such a model.
    """
    kind, _, sizes = text.partition(":")
    given = dict(_size(pair) for pair in sizes.split(",") if pair)
    try:
        config = MODELS.validate({"kind": kind, **given})
    except ValidationError as error:
        problems = (f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
        raise ValueError(f"model {text!r}: {'; '.join(problems)}.") from None
    for data in sorted(DATASETS.kinds(), key=lambda each: each != "digits"):
        spec = DATASETS.validate({"kind": data}).spec()
        try:
            if spec is not None:
                config.check(spec)
                return Described(config, spec, data)
        except ValueError:
            continue
    raise ValueError(f"none of the data sets {', '.join(DATASETS.kinds())} is for model {text!r}.")


def _size(pair: str) -> tuple[str, Any]:
    """Returns key and value of "width=256" or "hidden=64x32"."""
    key, equals, value = pair.partition("=")
    if not equals or not all(part.isdecimal() for part in value.split("x")):
        raise ValueError(f"expected sizes such as width=256 or hidden=64x32 behind the model's kind, got {pair!r}.")
    numbers = [int(part) for part in value.split("x")]
    return key, numbers if "x" in value else numbers[0]


def count_parameters(model: Described) -> int:
    """Returns how many parameters the model has."""
    import jax
    from flax import nnx

    from precision_lab.models import build

    state = nnx.eval_shape(lambda: nnx.state(build(model.config, model.spec, 0), nnx.Param))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state))


def activation_bytes(model: Described, policy: Any, *, batch: int) -> int:
    """Returns the bytes that the model's forward pass under `policy` keeps for its backward pass.

    What differentiation keeps is traced for one example and for two; the difference is what each example adds, and
    excludes parameters and their copies. A compiler may recompute some of it, and the loss keeps its own.
    """
    one, two = (_kept_bytes(model, policy, size) for size in (1, 2))
    return batch * (two - one)


def _kept_bytes(model: Described, policy: Any, batch: int) -> int:
    """Returns the bytes of everything that the backward pass of a batch needs."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from precision_lab.models import build
    from precision_lab.nn import apply_policy

    tokens = model.spec.task != "classification"
    x = jax.ShapeDtypeStruct((batch, *model.spec.input_shape), jnp.int32 if tokens else jnp.float32)

    def kept(x: Any) -> list[Any]:
        graph, params, rest = nnx.split(apply_policy(build(model.config, model.spec, 0), policy), nnx.Param, ...)
        return jax.tree.leaves(jax.vjp(lambda params: nnx.merge(graph, params, rest)(x), params)[1])

    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.eval_shape(kept, x))
