"""Model configs: what to build, as data. JAX is not imported here.

A config gives the sizes that are the experimenter's choice; what the data dictates (input shape, number of classes)
comes from its `DataSpec`. Nothing here names a dtype: a model is float32, and a policy is applied to it afterwards.
"""

import dataclasses
from typing import Annotated, Literal

from pydantic import BeforeValidator, SerializeAsAny, model_validator

from precision_lab.models.fields import Bool, FrozenConfig, PositiveInt, Widths, located_error
from precision_lab.models.registry import Builder, Registry


@dataclasses.dataclass(frozen=True)
class DataSpec:
    """What a data set asks of a model.

    Attributes:
      task: "classification" maps one example of `input_shape` to `num_classes` logits; "language_model" maps a
        sequence of tokens, `input_shape` = (length,), to `num_classes` logits for each next token; "next_token" maps
        it to those of the one after its last.
      input_shape: shape of one example, without the batch axis; images are (height, width, channels).
      num_classes: number of classes, or the size of the vocabulary.
    """

    task: Literal["classification", "language_model", "next_token"]
    input_shape: tuple[int, ...]
    num_classes: int


class ModelConfig(FrozenConfig):
    """Base of all model configs."""

    kind: str

    def check(self, spec: DataSpec) -> None:
        """Raises ValueError if this model cannot learn data of `spec`; any data will do unless overridden."""


def _expect_task(config: ModelConfig, spec: DataSpec, task: str) -> None:
    if spec.task != task:
        raise ValueError(f"model kind '{config.kind}' is for {task} data, got {spec.task} data")


class MLPConfig(ModelConfig):
    """Dense layers with ReLU between them; `hidden` holds the width of each layer but the last."""

    kind: Literal["mlp"] = "mlp"
    hidden: Widths = (128, 128)

    def check(self, spec: DataSpec) -> None:
        """Raises ValueError unless `spec` is classification."""
        _expect_task(self, spec, "classification")


class ConvNetConfig(ModelConfig):
    """3x3 convolutions with ReLU and 2x2 pooling, global average, one dense layer.

    `channels` holds the width of each convolution; all but the last are followed by pooling.
    """

    kind: Literal["convnet"] = "convnet"
    channels: Widths = (16, 32)
    norm: Literal["none", "batch"] = "none"

    @model_validator(mode="after")
    def _has_a_convolution(self) -> "ConvNetConfig":
        if not self.channels:
            message = "channels is empty: a convnet needs at least one convolution, such as [16, 32]"
            raise located_error(("channels",), message, self.channels)
        return self

    def check(self, spec: DataSpec) -> None:
        """Raises ValueError unless `spec` is images that survive the pooling."""
        _expect_task(self, spec, "classification")
        if len(spec.input_shape) != 3:
            raise ValueError(f"model kind 'convnet' needs images (height, width, channels), got {spec.input_shape}")
        side = min(spec.input_shape[:2])
        if side < 2 ** (len(self.channels) - 1):
            raise ValueError(
                f"{len(self.channels)} channels mean {len(self.channels) - 1} halvings, too many for images of "
                f"{spec.input_shape}: use at most {side.bit_length()} channels"
            )


class TransformerConfig(ModelConfig):
    """Decoder-only transformer: pre-LayerNorm, causal softmax attention, GELU MLP, learned positions.

    `mlp_ratio` is the width of the MLP over that of the residual stream; `tie_embeddings` uses the token embedding
    as the output projection.
    """

    kind: Literal["transformer"] = "transformer"
    depth: PositiveInt = 2
    width: PositiveInt = 128
    heads: PositiveInt = 4
    mlp_ratio: PositiveInt = 4
    tie_embeddings: Bool = False

    @model_validator(mode="after")
    def _heads_divide_width(self) -> "TransformerConfig":
        if self.width % self.heads:
            message = f"width must be a multiple of heads: width is {self.width}, heads is {self.heads}"
            raise located_error(("width",), message, self.width)
        return self

    def check(self, spec: DataSpec) -> None:
        """Raises ValueError unless `spec` is a language model's."""
        _expect_task(self, spec, "language_model")


class CharResMLPConfig(ModelConfig):
    """Residual ReLU MLP on the embedded tokens of a short context, which predicts the next one.

    `embedding` numbers for each token, concatenated and projected to `width`; `depth` pre-LayerNorm blocks from
    `width` to `expansion * width` and back; LayerNorm; logits.
    """

    kind: Literal["char_resmlp"] = "char_resmlp"
    width: PositiveInt = 64
    depth: PositiveInt = 2
    expansion: PositiveInt = 2
    embedding: PositiveInt = 16

    def check(self, spec: DataSpec) -> None:
        """Raises ValueError unless `spec` is contexts with their next token."""
        _expect_task(self, spec, "next_token")


MODELS: Registry[ModelConfig] = Registry("model", ModelConfig)
MODELS.register("mlp", MLPConfig, "precision_lab.models.mlp:MLP.build")
MODELS.register("convnet", ConvNetConfig, "precision_lab.models.convnet:ConvNet.build")
MODELS.register("char_resmlp", CharResMLPConfig, "precision_lab.models.char_resmlp:CharResMLP.build")
MODELS.register("transformer", TransformerConfig, "precision_lab.models.transformer:Transformer.build")

AnyModel = Annotated[SerializeAsAny[ModelConfig], BeforeValidator(MODELS.validate)]
"""Field type: a model config of any registered kind."""


def register_model(kind: str, config_cls: type[ModelConfig], builder: Builder | str) -> None:
    """Lets configs name a model of your own.

    Args:
      kind: the tag that configs will use.
      config_cls: subclass of `ModelConfig` with `kind: Literal[kind] = kind`.
      builder: `builder(config, spec, rngs) -> nnx.Module`; spec is a `DataSpec`, rngs an `nnx.Rngs`. The module maps
        a batch of inputs to float logits. A "module:function" string is imported at first use.

    Raises:
      TypeError, ValueError: see `Registry.register`.
    """
    MODELS.register(kind, config_cls, builder)
