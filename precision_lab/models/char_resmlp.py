"""Residual MLP over a short context of characters: the parts that precision papers need, at milliseconds a step.

A LayerNorm whose gain feeds a product, a ReLU pair, a residual stream, and a softmax head.

Source: the residual form is that of He et al., "Identity Mappings in Deep Residual Networks", 2016, arXiv:1603.05027,
with LayerNorm in place of batch norm; initialisation He et al., 2015, arXiv:1502.01852, equation 10, before a ReLU.
"""

import jax
from flax import nnx

from precision_lab.models.config import CharResMLPConfig, DataSpec


class ResidualBlock(nnx.Module):
    """`x + down(relu(up(norm(x))))`, without biases in the two products."""

    def __init__(self, width: int, inner: int, *, rngs: nnx.Rngs) -> None:
        """Makes `up` (width, inner) and `down` (inner, width)."""
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.up = nnx.Linear(width, inner, use_bias=False, kernel_init=nnx.initializers.he_normal(), rngs=rngs)
        self.down = nnx.Linear(inner, width, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns (batch, width) for `x` (batch, width)."""
        return x + self.down(jax.nn.relu(self.up(self.norm(x))))


class CharResMLP(nnx.Module):
    """Token embeddings, one projection, residual blocks, LayerNorm, logits."""

    def __init__(self, config: CharResMLPConfig, *, context: int, vocabulary: int, rngs: nnx.Rngs) -> None:
        """Makes a model for contexts of exactly `context` tokens."""
        width = config.width
        self.tokens = nnx.Embed(vocabulary, config.embedding, rngs=rngs)
        self.project = nnx.Linear(context * config.embedding, width, rngs=rngs)
        self.blocks = nnx.List([ResidualBlock(width, config.expansion * width, rngs=rngs) for _ in range(config.depth)])
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, vocabulary, rngs=rngs)

    @classmethod
    def build(cls, config: CharResMLPConfig, spec: DataSpec, rngs: nnx.Rngs) -> "CharResMLP":
        """Returns the model that `config` describes for text of `spec`."""
        return cls(config, context=spec.input_shape[0], vocabulary=spec.num_classes, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Returns logits (batch, vocabulary) of the token after `tokens` (batch, context), integers."""
        x = self.project(self.tokens(tokens).reshape(tokens.shape[0], -1))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))
