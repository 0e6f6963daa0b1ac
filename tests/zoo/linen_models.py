"""Linen models as people write them, none of which knows of precision policies. Sizes are tiny, structures are real."""

import jax
import jax.numpy as jnp
from flax import linen as nn


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        for width in (16, 16):
            x = nn.gelu(nn.Dense(width)(x))
        return nn.Dense(3)(x)


class ResidualBlock(nn.Module):
    features: int

    @nn.compact
    def __call__(self, x, train):
        y = nn.gelu(nn.BatchNorm(use_running_average=not train)(nn.Conv(self.features, (3, 3), use_bias=False)(x)))
        y = nn.BatchNorm(use_running_average=not train)(nn.Conv(self.features, (3, 3), use_bias=False)(y))
        if x.shape != y.shape:
            x = nn.Conv(self.features, (1, 1), name="shortcut")(x)
        return nn.gelu(x + y)


class CNN(nn.Module):
    """A small residual network with batch norm and dropout."""

    @nn.compact
    def __call__(self, x, train=True):
        x = nn.max_pool(nn.gelu(nn.Conv(4, (3, 3), strides=2)(x)), (2, 2))
        for features in (4, 8):
            x = ResidualBlock(features)(x, train)
        x = nn.Dropout(0.2, deterministic=not train)(x.mean((1, 2)))
        return nn.Dense(3)(x)


class Tagger(nn.Module):
    """Embedding, bidirectional LSTM, GRU, classifier, with padded sequences."""

    @nn.compact
    def __call__(self, tokens, lengths):
        x = nn.Embed(11, 8)(tokens)
        x = nn.Bidirectional(nn.RNN(nn.OptimizedLSTMCell(8)), nn.RNN(nn.LSTMCell(8)))(x, seq_lengths=lengths)
        x = nn.RNN(nn.GRUCell(8))(x, seq_lengths=lengths)
        return nn.Dense(3)(x)


class EncoderBlock(nn.Module):
    @nn.compact
    def __call__(self, x, mask):
        x = x + nn.MultiHeadDotProductAttention(num_heads=2)(nn.LayerNorm()(x), mask=mask)
        return x + nn.Dense(x.shape[-1])(nn.gelu(nn.Dense(16)(nn.LayerNorm()(x))))


class DecoderBlock(nn.Module):
    decode: bool = False

    @nn.compact
    def __call__(self, x, encoded, self_mask, cross_mask):
        attend = nn.MultiHeadDotProductAttention(num_heads=2, decode=self.decode, name="self_attention")
        x = x + attend(nn.LayerNorm()(x), mask=self_mask)
        x = x + nn.MultiHeadDotProductAttention(num_heads=2, name="cross")(nn.LayerNorm()(x), encoded, mask=cross_mask)
        return x + nn.Dense(x.shape[-1])(nn.gelu(nn.Dense(16)(nn.LayerNorm()(x))))


class Translator(nn.Module):
    """An encoder-decoder transformer in setup style, with `encode` and `decode` methods and a KV cache."""

    decoding: bool = False

    def setup(self):
        self.embed = nn.Embed(11, 8)
        self.encoder = [EncoderBlock() for _ in range(2)]
        self.decoder = [DecoderBlock(self.decoding) for _ in range(2)]
        self.norm = nn.LayerNorm(epsilon=1e-12)

    def encode(self, source):
        x, mask = self.embed(source), nn.make_attention_mask(source > 0, source > 0)
        for block in self.encoder:
            x = block(x, mask)
        return x

    def decode(self, encoded, source, target):
        causal = None if self.decoding else nn.make_causal_mask(target)
        x, mask = self.embed(target), nn.make_attention_mask(target > 0, source > 0)
        for block in self.decoder:
            x = block(x, encoded, causal, mask)
        return self.embed.attend(self.norm(x))

    def __call__(self, source, target):
        return self.decode(self.encode(source), source, target)


class VAE(nn.Module):
    @nn.compact
    def __call__(self, x):
        hidden = nn.gelu(nn.Dense(16)(x))
        mean, log_variance = nn.Dense(4, name="mean")(hidden), nn.Dense(4, name="log_variance")(hidden)
        noise = jax.random.normal(self.make_rng("noise"), mean.shape)
        z = mean + jnp.exp(0.5 * log_variance) * noise
        return nn.Dense(x.shape[-1])(nn.gelu(nn.Dense(16)(z))), mean, log_variance


class ViT(nn.Module):
    @nn.compact
    def __call__(self, images, train=True):
        x = nn.Conv(8, (4, 4), strides=4, padding="VALID", name="patches")(images)
        x = x.reshape(x.shape[0], -1, 8)
        token = self.param("cls", nn.initializers.zeros, (1, 1, 8))
        x = jnp.concatenate([jnp.tile(token, (x.shape[0], 1, 1)), x], axis=1)
        x = x + self.param("position", nn.initializers.normal(0.02), (1, x.shape[1], 8))
        x = nn.Dropout(0.1, deterministic=not train)(x)
        for _ in range(2):
            x = EncoderBlock()(x, None)
        return nn.Dense(3, name="head")(nn.LayerNorm()(x)[:, 0])


class GPTBlock(nn.Module):
    @nn.compact
    def __call__(self, x, mask):
        x = x + nn.MultiHeadDotProductAttention(num_heads=2)(nn.LayerNorm()(x), mask=mask)
        x = x + nn.Dropout(0.1, deterministic=False)(nn.Dense(8)(nn.gelu(nn.Dense(16)(nn.LayerNorm()(x)))))
        return x, None


class GPT(nn.Module):
    """A decoder with its layers scanned and rematerialised, and tied embeddings."""

    saved: str = "nothing_saveable"

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(11, 8)
        x = embed(tokens) + self.param("position", nn.initializers.normal(0.02), (tokens.shape[1], 8))
        block = nn.remat(GPTBlock, prevent_cse=False, policy=getattr(jax.checkpoint_policies, self.saved))
        layers = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=nn.broadcast,
            length=3,
        )
        x, _ = layers(name="layers")(x, nn.make_causal_mask(tokens))
        return embed.attend(nn.LayerNorm()(x))


class Rotary(nn.Module):
    """Attention with rotary angles from an integer-by-float einsum at the highest precision."""

    @nn.compact
    def __call__(self, tokens, positions):
        x = nn.Embed(11, 8)(tokens)
        query, key, value = (nn.DenseGeneral((2, 4), name=name)(x) for name in ("query", "key", "value"))
        frequencies = 10_000.0 ** -(jnp.arange(2) / 2)
        angles = jnp.einsum("bt,f->btf", positions, frequencies, precision=jax.lax.Precision.HIGHEST)
        query, key = rotate(query, angles), rotate(key, angles)
        x = nn.DenseGeneral(8, axis=(-2, -1), name="out")(nn.dot_product_attention(query, key, value))
        return nn.Dense(3)(x)


def rotate(x, angles):
    """Rotates pairs of features by their angles."""
    sin, cos = jnp.sin(angles)[:, :, None], jnp.cos(angles)[:, :, None]
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1)


class Explicit(nn.Module):
    """Everything in an explicit float32, which undoes a cast of the parameters."""

    @nn.compact
    def __call__(self, x):
        x = nn.LayerNorm(dtype=jnp.float32)(nn.Dense(16, dtype=jnp.float32, param_dtype=jnp.float32)(x))
        x = nn.BatchNorm(use_running_average=False, dtype=jnp.float32)(x)
        x = nn.MultiHeadDotProductAttention(num_heads=2, dtype=jnp.float32)(x[None])[0]
        return nn.Dense(3, dtype=jnp.float32)(x.astype(jnp.float32))


class Ensemble(nn.Module):
    """Members of a vmapped module, and a switch between branches."""

    @nn.compact
    def __call__(self, x):
        members = nn.vmap(MLP, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=None, axis_size=3)
        x = members(name="members")(x).mean(0)
        branches = [nn.Dense(3, name=name) for name in ("first", "second")]
        if self.is_initializing():
            return nn.Dense(3, name="head")(sum(branch(x) for branch in branches))
        x = nn.switch(1, [lambda _, x, i=i: branches[i](x) for i in range(2)], self, x)
        return nn.Dense(3, name="head")(x)
