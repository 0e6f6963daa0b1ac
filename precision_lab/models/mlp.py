"""Multilayer perceptron."""

import jax
from flax import nnx

from precision_lab.models.config import DataSpec, MLPConfig


class MLP(nnx.Module):
    """Dense layers with ReLU between them, on flattened inputs.

    Hidden kernels start as He et al., "Delving Deep into Rectifiers", 2015, arXiv:1502.01852, equation 10, which keeps
    the size of activations through ReLU; the last one by fan-in without the factor 2, biases at zero.
    """

    def __init__(self, inputs: int, hidden: tuple[int, ...], outputs: int, *, rngs: nnx.Rngs) -> None:
        """Makes `len(hidden)` hidden layers and the output layer `head`."""
        he = nnx.initializers.he_normal()
        widths = (inputs, *hidden)
        self.layers = nnx.List(
            [nnx.Linear(i, o, kernel_init=he, rngs=rngs) for i, o in zip(widths, hidden, strict=False)]
        )
        self.head = nnx.Linear(widths[-1], outputs, rngs=rngs)

    @classmethod
    def build(cls, config: MLPConfig, spec: DataSpec, rngs: nnx.Rngs) -> "MLP":
        """Returns the model that `config` describes for data of `spec`."""
        inputs = 1
        for side in spec.input_shape:
            inputs *= side
        return cls(inputs, config.hidden, spec.num_classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns logits (batch, classes) for `x` (batch, ...)."""
        x = x.reshape(x.shape[0], -1)
        for layer in self.layers:
            x = jax.nn.relu(layer(x))
        return self.head(x)
