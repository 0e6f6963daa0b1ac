"""Arms of the quantization benchmark: steps and inference of one NNX model, under our policies and under peers.

Arms share model, initialisation, batch and granularity: int8 has one scale for each output channel of a weight and one
for each row of an activation; 4-bit weights for inference have groups whose size divides every width, which Qwix asks
for. They differ in whose quantization it is. Every arm of a peer is made by a function that imports it.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import jax
import optax
from flax import nnx

from precision_lab import models
from precision_lab.bench.arms import Arm, Problem, State, batch_of, training
from precision_lab.models import DataSpec
from precision_lab.models.config import MLPConfig, TransformerConfig
from precision_lab.nn import apply_policy, calibrate, convert

PROBLEMS = {
    "mlp": Problem(MLPConfig(hidden=(1024, 1024)), DataSpec("classification", (784,), 10), batch=256),
    "transformer": Problem(
        TransformerConfig(depth=4, width=256, heads=4), DataSpec("language_model", (128,), 256), batch=16
    ),
}
SMALL = {
    "mlp": Problem(MLPConfig(hidden=(32,)), DataSpec("classification", (16,), 10), batch=4),
    "transformer": Problem(TransformerConfig(depth=1, width=32, heads=2), DataSpec("language_model", (8,), 32), 2),
}

_W8A8, _W4A8 = (f"weight={weight}@channel,activation=int8@token" for weight in ("int8", "int4"))
STEPS = {
    "W8A8 simulated": f"{_W8A8},execution=simulated",
    "W8A8 native": f"{_W8A8},compute=bfloat16,execution=native",
    "W8A8 native, float32 backward": f"{_W8A8},execution=native",
    "W4A8 native": f"{_W4A8},compute=bfloat16,execution=native",
    "W4A16": "weight=int4@channel,compute=bfloat16",
}
# {n} is the size of a group, at most that of the format's usual blocks.
INFERENCE = {
    "int8 dynamic": f"{_W8A8},execution=native",
    "int8 static": "weight=int8@channel,activation=int8@tensor,execution=native",
    "int4 weights": "weight=int4@group{n},compute=bfloat16",
    "int4 weights, float32 products": "weight=int4@group{n}",
    "NF4 weights": "weight=nf4@group{n},compute=bfloat16",
    "NF4 weights, float32 products": "weight=nf4@group{n}",
}
_USUAL = {"int4": 32, "NF4": 64}
# Qwix would quantize the two products of attention, which are einsums here, as well.
_LINEAR = ("dot_general",)
Make = Callable[[], Arm]


def converted(model: nnx.Module, policy: str, x: jax.Array, *, static: bool) -> nnx.Module:
    """Returns the model that inference under a policy calls: weights packed, products of codes where there are any.

    Args:
      model: the float32 model.
      policy: the policy.
      x: an example batch, and for static scales the one that they are calibrated on.
      static: whether activations have static scales.
    """
    return convert(calibrate(model, policy, [x])) if static else convert(model, policy, x)


def group_size(problem: Problem, weights: str) -> int:
    """Returns the elements that share a scale of 4-bit weights: the largest power of two that divides every width."""
    config = problem.config.model_dump()
    widths = (*problem.spec.input_shape, *config["hidden"]) if "hidden" in config else (config["width"],)
    widest = math.gcd(*widths)
    return min(_USUAL[weights], widest & -widest)


def steps(problem: Problem) -> dict[str, Make]:
    """Returns training steps by name, float32 first, then ours, then those of the peers that are installed."""

    def under(policy: str) -> Make:
        return lambda: _step(problem, lambda model: apply_policy(model, policy))

    ours = {"float32": lambda: _step(problem, lambda model: model)}
    ours |= {name: under(policy) for name, policy in STEPS.items()}
    peers = {name: lambda change=change: _step(problem, change) for name, change in _training_peers().items()}
    return {**ours, **peers}


def inference(problem: Problem) -> dict[str, Make]:
    """Returns calls of the model by name, float32 first, then ours, then those of the peers that are installed."""
    x = batch_of(problem)["inputs"]

    def under(name: str, policy: str) -> Make:
        n, static = group_size(problem, name.split()[0]) if "{n}" in policy else 0, name.endswith("static")
        return lambda: _forward(problem, lambda model: converted(model, policy.format(n=n), x, static=static))

    ours = {"float32 inference": lambda: _forward(problem, lambda model: model)}
    ours |= {f"inference {name}": under(name, policy) for name, policy in INFERENCE.items()}
    peers = {
        name: lambda change=change: _forward(problem, change) for name, change in _inference_peers(problem, x).items()
    }
    return {**ours, **peers}


def _step(problem: Problem, change: Callable[[Any], Any]) -> Arm:
    """Returns a training step with Adam."""
    return training(problem, model=change, tx=optax.adam(1e-3))


def _forward(problem: Problem, change: Callable[[Any], Any]) -> Arm:
    """Returns a call of the model whose state is what it stores, given back as it came."""
    model = change(models.build(problem.config, problem.spec, 0))
    graphdef, stored = nnx.split(model)

    def call(state: State, batch: Any) -> tuple[State, jax.Array, None]:
        called = nnx.merge(graphdef, state.params)
        return state, called(batch["inputs"]), None  # pyright: ignore[reportCallIssue]

    return Arm(call, State(stored, None, None), batch_of(problem))


def _training_peers() -> dict[str, Callable[[Any], Any]]:
    """Returns what the peers that are installed do to a model that is to be trained, by name."""
    found = {}
    for make in (_qwix_training, _aqt_training):
        try:
            found |= make()
        except ImportError:
            continue
    return found


def _qwix_training() -> dict[str, Callable[[Any], Any]]:
    """Returns Qwix's quantized training; no first call of the model, which only static ranges need."""
    qwix = importlib.import_module("qwix")

    def under(**rule: Any) -> Callable[[Any], Any]:
        provider = qwix.QtProvider([qwix.QtRule(op_names=_LINEAR, **rule)])
        return lambda model: qwix.quantize_model(model, provider, None, skip_nnx_init=True)

    return {
        "Qwix W8A8": under(weight_qtype="int8", act_qtype="int8"),
        "Qwix W4A8": under(weight_qtype="int4", act_qtype="int8"),
        "Qwix W4A16": under(weight_qtype="int4"),
    }


def _aqt_training() -> dict[str, Callable[[Any], Any]]:
    """Returns AQT's quantized products in every linear layer; forward only, as the others."""
    config = importlib.import_module("aqt.jax.v2.config")
    int8 = config.config_v4(fwd_bits=8, dlhs_bits=None, drhs_bits=None)
    config.set_context(int8, None, None)

    def product(lhs: Any, rhs: Any, numbers: Any, **options: Any) -> jax.Array:
        # Flax passes `out_sharding` and precisions, which AQT does not take; its configs serve one call only.
        del options
        return deepcopy(int8)(lhs, rhs, numbers)

    def change(model: Any) -> Any:
        for _, module in nnx.iter_modules(model):
            if isinstance(module, nnx.Linear):
                module.dot_general = product
        return model

    return {"AQT W8A8": change}


def _inference_peers(problem: Problem, x: jax.Array) -> dict[str, Callable[[Any], Any]]:
    """Returns what Qwix does to a trained model, if it is installed; its tiles are our groups."""
    try:
        qwix = importlib.import_module("qwix")
    except ImportError:
        return {}

    def under(**rule: Any) -> Callable[[Any], Any]:
        provider = qwix.PtqProvider([qwix.QuantizationRule(op_names=_LINEAR, **rule)])
        return lambda model: qwix.quantize_model(model, provider, x)

    return {
        "Qwix inference int8 dynamic": under(weight_qtype="int8", act_qtype="int8"),
        "Qwix inference int4 weights": under(weight_qtype="int4", tile_size=group_size(problem, "int4")),
        "Qwix inference NF4 weights": under(weight_qtype="nf4", tile_size=group_size(problem, "NF4")),
    }
