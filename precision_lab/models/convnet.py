"""Small convolutional network."""

import jax
from flax import nnx

from precision_lab.models.config import ConvNetConfig, DataSpec


class ConvLayer(nnx.Module):
    """3x3 convolution, batch normalisation if asked for, ReLU; He initialisation, see `MLP`."""

    def __init__(self, inputs: int, outputs: int, *, batch_norm: bool, rngs: nnx.Rngs) -> None:
        """Makes the layer; with batch normalisation the convolution needs no bias."""
        he = nnx.initializers.he_normal()
        self.conv = nnx.Conv(inputs, outputs, (3, 3), use_bias=not batch_norm, kernel_init=he, rngs=rngs)
        self.norm = nnx.BatchNorm(outputs, rngs=rngs) if batch_norm else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns (batch, height, width, outputs) for (batch, height, width, inputs)."""
        x = self.conv(x)
        if self.norm is not None:
            x = self.norm(x)
        return jax.nn.relu(x)


class ConvNet(nnx.Module):
    """Convolutions with 2x2 max pooling after all but the last, global average, one dense layer."""

    def __init__(
        self, inputs: int, channels: tuple[int, ...], outputs: int, *, batch_norm: bool, rngs: nnx.Rngs
    ) -> None:
        """Makes a convolution for each of `channels` and the output layer `head`."""
        widths = (inputs, *channels)
        self.layers = nnx.List(
            [ConvLayer(i, o, batch_norm=batch_norm, rngs=rngs) for i, o in zip(widths, channels, strict=False)]
        )
        self.head = nnx.Linear(widths[-1], outputs, rngs=rngs)

    @classmethod
    def build(cls, config: ConvNetConfig, spec: DataSpec, rngs: nnx.Rngs) -> "ConvNet":
        """Returns the model that `config` describes for images of `spec`."""
        inputs = spec.input_shape[-1]
        return cls(inputs, config.channels, spec.num_classes, batch_norm=config.norm == "batch", rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns logits (batch, classes) for images `x` (batch, height, width, channels)."""
        for i, layer in enumerate(self.layers):
            if i > 0:
                x = nnx.max_pool(x, (2, 2), strides=(2, 2))
            x = layer(x)
        return self.head(x.mean(axis=(1, 2)))
