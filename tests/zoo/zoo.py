"""The zoo: every model in both Flax APIs, and how it is run as a pure function of its parameters."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from precision_lab.nn import apply_policy
from tests.zoo import linen_models, nnx_models

RNG = np.random.default_rng(0)
TOKENS = RNG.integers(1, 11, (2, 6))
PADDED = np.where(np.arange(6) < [[6], [4]], TOKENS, 0)
FEATURES = RNG.standard_normal((8, 6), dtype=np.float32)
IMAGES = RNG.standard_normal((6, 8, 8, 2), dtype=np.float32)
# So many that one maximum of a pool that flips in bfloat16 does not decide the gradient.
MORE_IMAGES = np.random.default_rng(1).standard_normal((32, 8, 8, 2), dtype=np.float32)

INPUTS = {
    "MLP": (FEATURES,),
    "CNN": (MORE_IMAGES,),
    "Tagger": (TOKENS, np.asarray([6, 4])),
    "Translator": (PADDED, TOKENS),
    "VAE": (FEATURES,),
    "ViT": (IMAGES,),
    "GPT": (TOKENS,),
    "Rotary": (TOKENS, np.asarray([np.arange(6) + 257] * 2)),
    "Explicit": (FEATURES,),
    "Ensemble": (FEATURES,),
}
# The products that have to stay as they are: rotary angles, which are those of positions and no one's weights.
LEFT_ALONE = {"Rotary": {("int32", "float32", "float32")}}
# Mutable collections of the Linen models, and names of their random streams.
COLLECTIONS, STREAMS = ["batch_stats"], ("params", "dropout", "noise")


class Program(NamedTuple):
    """A model as a pure function.

    Attributes:
      run: `params -> (outputs, state)`, the state being everything that the call changed and is no parameter.
      params: its parameters, plain arrays.
    """

    run: Callable[[Any], tuple[Any, Any]]
    params: Any

    def loss(self, params: Any) -> tuple[jax.Array, Any]:
        """A loss that depends on every output, and (outputs, state)."""
        out, state = self.run(params)
        leaves = [leaf.astype(jnp.float32) for leaf in jax.tree.leaves(out)]
        return -sum(jax.nn.log_softmax(leaf)[..., 0].mean() for leaf in leaves), (out, state)


def build(kind: str, name: str, **options: Any) -> Any:
    """Returns a fresh model without a policy."""
    if kind == "linen":
        return getattr(linen_models, name)(**options)
    make = getattr(nnx_models, name)
    graphdef, state = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0, noise=1, dropout=2), **options)))
    return nnx.merge(graphdef, jax.tree_util.tree_map_with_path(_draw, state))


def program(kind: str, name: str, policy: str | None, **options: Any) -> Program:
    """Returns a model of the zoo, under a policy unless that is None."""
    model = build(kind, name, **options)
    if policy is not None:
        model = apply_policy(model, policy)
    return (linen_program if kind == "linen" else nnx_program)(model, *INPUTS[name])


def linen_program(model: Any, *inputs: Any) -> Program:
    """Takes a Linen model apart; its parameters are drawn here, since to compile an initialisation takes long."""
    rngs = {stream: jax.random.key(i) for i, stream in enumerate(STREAMS)}
    variables = jax.tree_util.tree_map_with_path(_draw, jax.eval_shape(model.init, rngs, *inputs))
    rest = {key: tree for key, tree in variables.items() if key != "params"}

    def run(params: Any) -> tuple[Any, Any]:
        return model.apply({"params": params, **rest}, *inputs, mutable=COLLECTIONS, rngs=rngs)

    return Program(run, variables["params"])


def nnx_program(model: Any, *inputs: Any) -> Program:
    """Takes an NNX model apart."""
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def run(params: Any) -> tuple[Any, Any]:
        copy = nnx.merge(graphdef, nnx.State(params), rest, copy=True)
        out = copy(*inputs)
        return out, nnx.to_pure_dict(nnx.state(copy, nnx.Not(nnx.Param)))

    return Program(run, params.raw_mapping)


def _draw(path: Any, like: Any) -> Any:
    """Draws a variable of the size that initialisers give it."""
    names = [str(getattr(key, "key", getattr(key, "name", ""))) for key in path]
    seed = zlib.crc32("/".join(names).encode())
    if jnp.issubdtype(like.dtype, jax.dtypes.prng_key):
        return jax.random.split(jax.random.key(seed), like.shape) if like.shape else jax.random.key(seed)
    if not jnp.issubdtype(like.dtype, jnp.floating):
        return jnp.zeros(like.shape, like.dtype)
    if {"scale", "var", "mean"} & set(names[-2:]) and "kernel" not in names:
        return jnp.full(like.shape, "mean" not in names, like.dtype)
    fan_in = max(1, math.prod(like.shape) // like.shape[-1]) if "kernel" in names else 25
    return jnp.asarray(np.random.default_rng(seed).standard_normal(like.shape) / np.sqrt(fan_in), like.dtype)
