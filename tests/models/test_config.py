"""Model configs: JAX-free, closed, located errors, and open to models of one's own."""

import subprocess
import sys
from typing import Literal

import pytest
from pydantic import BaseModel, ConfigDict, ValidationError

from precision_lab.models import MODELS, ConvNetConfig, DataSpec, MLPConfig, ModelConfig, TransformerConfig
from precision_lab.models.config import AnyModel

DIGITS = DataSpec("classification", (8, 8, 1), 10)
TEXT = DataSpec("language_model", (128,), 65)


class Holder(BaseModel):
    model_config = ConfigDict(extra="forbid")
    model: AnyModel


def errors(model):
    with pytest.raises(ValidationError) as caught:
        Holder.model_validate({"model": model})
    return [(error["loc"], error["msg"]) for error in caught.value.errors()]


def test_configs_import_no_jax():
    modules = "precision_lab.models, precision_lab.data, precision_lab.training.config"
    code = f"import sys, {modules}; print('jax' in sys.modules)"

    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout

    assert printed.strip() == "False"


@pytest.mark.parametrize("cls", [MLPConfig, ConvNetConfig, TransformerConfig])
def test_a_config_survives_its_own_dump(cls):
    held = Holder(model=cls())

    assert Holder.model_validate(held.model_dump()) == held
    assert Holder.model_validate_json(held.model_dump_json()) == held
    assert hash(held.model) == hash(cls())


@pytest.mark.parametrize(
    ("wrong", "where", "what"),
    [
        ({"kind": "mpl"}, ("model", "kind"), "Did you mean 'mlp'?"),
        ({"hidden": [3]}, ("model", "kind"), "a model needs a kind: one of char_resmlp, convnet"),
        ({"kind": ["mlp"]}, ("model", "kind"), "unknown model kind"),
        ({"kind": "mlp", "hiden": [3]}, ("model", "hiden"), "Extra inputs"),
        ({"kind": "mlp", "hidden": [8, 0]}, ("model", "hidden", 1), "greater than or equal to 1"),
        ({"kind": "mlp", "hidden": ["8"]}, ("model", "hidden", 0), "valid integer"),
        ({"kind": "mlp", "hidden": [True]}, ("model", "hidden", 0), "valid integer"),
        ({"kind": "transformer", "width": 10, "heads": 4}, ("model", "width"), "multiple of heads"),
        ({"kind": "convnet", "channels": []}, ("model", "channels"), "at least one convolution"),
        ("mlp", ("model",), "expected a mapping with a 'kind'"),
    ],
)
def test_a_wrong_field_is_located(wrong, where, what):
    [(loc, message)] = errors(wrong)

    assert loc == where
    assert what in message


@pytest.mark.parametrize(
    ("config", "spec", "message"),
    [
        (MLPConfig(), TEXT, "'mlp' is for classification data, got language_model"),
        (TransformerConfig(), DIGITS, "'transformer' is for language_model data"),
        (ConvNetConfig(), DataSpec("classification", (64,), 2), r"needs images .* got \(64,\)"),
        (ConvNetConfig(channels=(4,) * 5), DIGITS, "use at most 4 channels"),
    ],
)
def test_a_model_that_cannot_learn_the_data_is_refused(config, spec, message):
    with pytest.raises(ValueError, match=message):
        config.check(spec)


def test_as_many_channels_as_the_message_allows_are_allowed():
    ConvNetConfig(channels=(4,) * 4).check(DIGITS)


def test_a_model_of_ones_own_joins_the_union():
    from flax import nnx

    from precision_lab import models

    class OwnConfig(ModelConfig):
        kind: Literal["own_linear"] = "own_linear"
        bias: bool = True

    def builder(config, spec, rngs):
        return nnx.Linear(spec.input_shape[0], spec.num_classes, use_bias=config.bias, rngs=rngs)

    models.register_model("own_linear", OwnConfig, builder)
    try:
        held = Holder.model_validate({"model": {"kind": "own_linear", "bias": False}})
        model = models.build(held.model, DataSpec("classification", (3,), 2), 0)

        assert model.bias is None
        assert held.model_dump() == {"model": {"kind": "own_linear", "bias": False}}
    finally:
        del MODELS._entries["own_linear"]


def test_a_kind_cannot_be_taken_twice_or_mislabelled():
    class Rogue(ModelConfig):
        kind: Literal["mlp"] = "mlp"

    with pytest.raises(ValueError, match=r"'mlp' is taken by precision_lab\.models\.config\.MLPConfig"):
        MODELS.register("mlp", Rogue, "nowhere:build")
    with pytest.raises(ValueError, match=r"Declare it as `kind: Literal\[\"other\"\]"):
        MODELS.register("other", Rogue, "nowhere:build")
    with pytest.raises(TypeError, match="must derive from ModelConfig"):
        MODELS.register("plain", BaseModel, "nowhere:build")  # type: ignore[arg-type]
