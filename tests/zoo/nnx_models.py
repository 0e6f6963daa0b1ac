"""NNX models as people write them, none of which knows of precision policies. Sizes are tiny, structures are real."""

import jax
import jax.numpy as jnp
from flax import nnx

from tests.zoo.linen_models import rotate


class MLP(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(a, b, rngs=rngs) for a, b in ((6, 16), (16, 16), (16, 3))])

    def __call__(self, x):
        for layer in self.layers[:-1]:
            x = nnx.gelu(layer(x))
        return self.layers[-1](x)


class ResidualBlock(nnx.Module):
    def __init__(self, features_in, features, rngs):
        self.first = nnx.Conv(features_in, features, (3, 3), use_bias=False, rngs=rngs)
        self.second = nnx.Conv(features, features, (3, 3), use_bias=False, rngs=rngs)
        self.norms = nnx.List([nnx.BatchNorm(features, rngs=rngs) for _ in range(2)])
        self.shortcut = nnx.Conv(features_in, features, (1, 1), rngs=rngs) if features_in != features else None

    def __call__(self, x):
        y = self.norms[1](self.second(nnx.gelu(self.norms[0](self.first(x)))))
        return nnx.gelu(y + (x if self.shortcut is None else self.shortcut(x)))


class CNN(nnx.Module):
    """A small residual network with batch norm and dropout."""

    def __init__(self, rngs):
        self.stem = nnx.Conv(2, 4, (3, 3), strides=2, rngs=rngs)
        self.blocks = nnx.Sequential(ResidualBlock(4, 4, rngs), ResidualBlock(4, 8, rngs))
        self.dropout = nnx.Dropout(0.2, rngs=rngs)
        self.head = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        x = self.blocks(nnx.max_pool(nnx.gelu(self.stem(x)), (2, 2)))
        return self.head(self.dropout(x.mean((1, 2))))


class Tagger(nnx.Module):
    """Embedding, bidirectional LSTM, GRU, classifier, with padded sequences."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(11, 8, rngs=rngs)
        self.recurrent = nnx.Bidirectional(
            nnx.RNN(nnx.OptimizedLSTMCell(8, 8, rngs=rngs)), nnx.RNN(nnx.LSTMCell(8, 8, rngs=rngs)), rngs=rngs
        )
        self.gru = nnx.RNN(nnx.GRUCell(16, 8, rngs=rngs))
        self.head = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, tokens, lengths):
        x = self.recurrent(self.embed(tokens), seq_lengths=lengths)
        return self.head(self.gru(x, seq_lengths=lengths))


class EncoderBlock(nnx.Module):
    def __init__(self, rngs, dropout=0.0):
        self.norms = nnx.List([nnx.LayerNorm(8, rngs=rngs) for _ in range(2)])
        self.attention = nnx.MultiHeadAttention(2, 8, rngs=rngs, decode=False)
        self.up, self.down = nnx.Linear(8, 16, rngs=rngs), nnx.Linear(16, 8, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)

    def __call__(self, x, mask):
        x = x + self.attention(self.norms[0](x), mask=mask)
        return x + self.dropout(self.down(nnx.gelu(self.up(self.norms[1](x)))))


class DecoderBlock(nnx.Module):
    def __init__(self, rngs):
        self.norms = nnx.List([nnx.LayerNorm(8, rngs=rngs) for _ in range(3)])
        self.attention = nnx.MultiHeadAttention(2, 8, rngs=rngs, decode=False)
        self.cross = nnx.MultiHeadAttention(2, 8, rngs=rngs, decode=False)
        self.up, self.down = nnx.Linear(8, 16, rngs=rngs), nnx.Linear(16, 8, rngs=rngs)

    def __call__(self, x, encoded, self_mask, cross_mask, decode=False):
        x = x + self.attention(self.norms[0](x), mask=self_mask, decode=decode)
        x = x + self.cross(self.norms[1](x), encoded, mask=cross_mask)
        return x + self.down(nnx.gelu(self.up(self.norms[2](x))))


class Translator(nnx.Module):
    """An encoder-decoder transformer with `encode` and `decode` methods and a KV cache."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(11, 8, rngs=rngs)
        self.encoder = nnx.List([EncoderBlock(rngs) for _ in range(2)])
        self.decoder = nnx.List([DecoderBlock(rngs) for _ in range(2)])
        self.norm = nnx.LayerNorm(8, epsilon=1e-12, rngs=rngs)

    def encode(self, source):
        x, mask = self.embed(source), nnx.make_attention_mask(source > 0, source > 0)
        for block in self.encoder:
            x = block(x, mask)
        return x

    def decode(self, encoded, source, target, decode=False):
        causal = None if decode else nnx.make_causal_mask(target)
        x, mask = self.embed(target), nnx.make_attention_mask(target > 0, source > 0)
        for block in self.decoder:
            x = block(x, encoded, causal, mask, decode)
        return self.embed.attend(self.norm(x))

    def init_cache(self, batch, length):
        for block in self.decoder:
            block.attention.init_cache((batch, length, 8))

    def __call__(self, source, target):
        return self.decode(self.encode(source), source, target)


class VAE(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(6, 16, rngs=rngs)
        self.mean, self.log_variance = nnx.Linear(16, 4, rngs=rngs), nnx.Linear(16, 4, rngs=rngs)
        self.decoder = nnx.Sequential(nnx.Linear(4, 16, rngs=rngs), nnx.gelu, nnx.Linear(16, 6, rngs=rngs))
        self.rngs = rngs

    def encode(self, x):
        hidden = nnx.gelu(self.hidden(x))
        return self.mean(hidden), self.log_variance(hidden)

    def generate(self, z):
        return self.decoder(z)

    def __call__(self, x):
        mean, log_variance = self.encode(x)
        z = mean + jnp.exp(0.5 * log_variance) * self.rngs.noise.normal(mean.shape)
        return self.generate(z), mean, log_variance


class ViT(nnx.Module):
    def __init__(self, rngs):
        self.patches = nnx.Conv(2, 8, (4, 4), strides=4, padding="VALID", rngs=rngs)
        self.token = nnx.Param(jnp.zeros((1, 1, 8)))
        self.position = nnx.Param(0.02 * jax.random.normal(rngs.params(), (1, 5, 8)))
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.blocks = nnx.List([EncoderBlock(rngs) for _ in range(2)])
        self.norm, self.head = nnx.LayerNorm(8, rngs=rngs), nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, images):
        x = self.patches(images)
        x = x.reshape(x.shape[0], -1, 8)
        x = jnp.concatenate([jnp.tile(self.token[...], (x.shape[0], 1, 1)), x], axis=1)
        x = self.dropout(x + self.position[...])
        for block in self.blocks:
            x = block(x, None)
        return self.head(self.norm(x)[:, 0])


class GPT(nnx.Module):
    """A decoder with its layers made by vmap, scanned and rematerialised, and tied embeddings."""

    def __init__(self, rngs, saved="nothing_saveable"):
        @nnx.split_rngs(splits=3)
        @nnx.vmap
        def block(rngs):
            return EncoderBlock(rngs, dropout=0.1)

        self.embed = nnx.Embed(11, 8, rngs=rngs)
        self.layers = block(rngs)
        self.norm = nnx.LayerNorm(8, rngs=rngs)
        self.saved = saved

    def __call__(self, tokens):
        mask = nnx.make_causal_mask(tokens)

        @nnx.scan(in_axes=(nnx.Carry, 0, None), out_axes=nnx.Carry)
        @nnx.remat(prevent_cse=False, policy=getattr(jax.checkpoint_policies, self.saved))
        def layers(x, block, mask):
            return block(x, mask)

        return self.embed.attend(self.norm(layers(self.embed(tokens), self.layers, mask)))


class Rotary(nnx.Module):
    """Attention with rotary angles from an integer-by-float einsum at the highest precision."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(11, 8, rngs=rngs)
        self.query, self.key, self.value = (nnx.LinearGeneral(8, (2, 4), rngs=rngs) for _ in range(3))
        self.out = nnx.LinearGeneral((2, 4), 8, axis=(-2, -1), rngs=rngs)
        self.head = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, tokens, positions):
        x = self.embed(tokens)
        frequencies = 10_000.0 ** -(jnp.arange(2) / 2)
        angles = jnp.einsum("bt,f->btf", positions, frequencies, precision=jax.lax.Precision.HIGHEST)
        query, key = rotate(self.query(x), angles), rotate(self.key(x), angles)
        return self.head(self.out(nnx.dot_product_attention(query, key, self.value(x))))


class Explicit(nnx.Module):
    """Everything in an explicit float32, which undoes a cast of the parameters."""

    def __init__(self, rngs):
        self.dense = nnx.Linear(6, 16, dtype=jnp.float32, param_dtype=jnp.float32, rngs=rngs)
        self.norm = nnx.LayerNorm(16, dtype=jnp.float32, rngs=rngs)
        self.batch_norm = nnx.BatchNorm(16, dtype=jnp.float32, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 16, dtype=jnp.float32, rngs=rngs, decode=False)
        self.head = nnx.Linear(16, 3, dtype=jnp.float32, rngs=rngs)

    def __call__(self, x):
        x = self.batch_norm(self.norm(self.dense(x)))
        return self.head(self.attention(x[None])[0].astype(jnp.float32))


class Ensemble(nnx.Module):
    """Members of a vmapped module, and a switch between branches."""

    def __init__(self, rngs):
        @nnx.split_rngs(splits=3)
        @nnx.vmap
        def members(rngs):
            return MLP(rngs)

        self.members = members(rngs)
        self.first, self.second, self.head = (nnx.Linear(3, 3, rngs=rngs) for _ in range(3))

    def __call__(self, x):
        x = nnx.vmap(lambda member, x: member(x), in_axes=(0, None))(self.members, x).mean(0)
        branches = [lambda model, x: model.first(x), lambda model, x: model.second(x)]
        x = nnx.switch(1, branches, self, x)
        return self.head(x)
