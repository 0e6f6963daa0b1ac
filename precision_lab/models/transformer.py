"""Decoder-only transformer language model.

Source: Radford et al., "Language Models are Unsupervised Multitask Learners" (GPT-2), 2019, section 2.3: LayerNorm
before each part and at the end, learned positions, initialisation 0.02 with the residual outputs scaled by
1/sqrt(2 * depth). Attention as in Vaswani et al., "Attention Is All You Need", 2017, arXiv:1706.03762, section 3.2.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from precision_lab.models.config import DataSpec, TransformerConfig

_STDDEV = 0.02


def _linear(inputs: int, outputs: int, stddev: float, rngs: nnx.Rngs) -> nnx.Linear:
    return nnx.Linear(inputs, outputs, kernel_init=nnx.initializers.normal(stddev), rngs=rngs)


class Attention(nnx.Module):
    """Causal multi-head attention; a position attends to itself and to those before it."""

    def __init__(self, width: int, heads: int, *, out_stddev: float, rngs: nnx.Rngs) -> None:
        """Makes the four projections (width, width)."""
        self.heads = heads
        self.query = _linear(width, width, _STDDEV, rngs)
        self.key = _linear(width, width, _STDDEV, rngs)
        self.value = _linear(width, width, _STDDEV, rngs)
        self.out = _linear(width, width, out_stddev, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns (batch, length, width) for `x` (batch, length, width)."""
        batch, length, width = x.shape
        split = (batch, length, self.heads, width // self.heads)
        query, key, value = (project(x).reshape(split) for project in (self.query, self.key, self.value))
        scores = jnp.einsum("btnh,bsnh->bnts", query, key) * split[-1] ** -0.5
        causal = jnp.tril(jnp.ones((length, length), bool))
        weights = jax.nn.softmax(jnp.where(causal, scores, -jnp.inf), axis=-1)
        return self.out(jnp.einsum("bnts,bsnh->btnh", weights, value).reshape(x.shape))


class Block(nnx.Module):
    """Attention, then a GELU MLP, each on a normalised copy of the residual stream."""

    def __init__(self, width: int, heads: int, mlp_width: int, *, out_stddev: float, rngs: nnx.Rngs) -> None:
        """Makes one block; `out_stddev` is for the two projections that write to the residual stream."""
        self.norm_attention = nnx.LayerNorm(width, rngs=rngs)
        self.attention = Attention(width, heads, out_stddev=out_stddev, rngs=rngs)
        self.norm_mlp = nnx.LayerNorm(width, rngs=rngs)
        self.up = _linear(width, mlp_width, _STDDEV, rngs)
        self.down = _linear(mlp_width, width, out_stddev, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns (batch, length, width) for `x` (batch, length, width)."""
        x = x + self.attention(self.norm_attention(x))
        return x + self.down(jax.nn.gelu(self.up(self.norm_mlp(x))))


class Transformer(nnx.Module):
    """Token and position embeddings, blocks, final LayerNorm, projection to the vocabulary."""

    def __init__(self, config: TransformerConfig, *, length: int, vocabulary: int, rngs: nnx.Rngs) -> None:
        """Makes a model for sequences of up to `length` tokens; a tied one has no `head`."""
        normal = nnx.initializers.normal(_STDDEV)
        out_stddev = _STDDEV / (2 * config.depth) ** 0.5
        width, mlp_width = config.width, config.mlp_ratio * config.width
        self.tokens = nnx.Embed(vocabulary, width, embedding_init=normal, rngs=rngs)
        self.positions = nnx.Embed(length, width, embedding_init=normal, rngs=rngs)
        self.blocks = nnx.List(
            [Block(width, config.heads, mlp_width, out_stddev=out_stddev, rngs=rngs) for _ in range(config.depth)]
        )
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.head = None if config.tie_embeddings else _linear(width, vocabulary, _STDDEV, rngs)

    @classmethod
    def build(cls, config: TransformerConfig, spec: DataSpec, rngs: nnx.Rngs) -> "Transformer":
        """Returns the model that `config` describes for text of `spec`."""
        return cls(config, length=spec.input_shape[0], vocabulary=spec.num_classes, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Returns logits (batch, length, vocabulary) of each next token for `tokens` (batch, length), integers."""
        x = self.tokens(tokens) + self.positions(jnp.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return self.tokens.attend(x) if self.head is None else self.head(x)
