"""Which numbers of a run its compiled step takes as arguments, so that runs that differ in them share one program.

Everything else in a config is structure: a field that is named nowhere here, such as one added later, gets a program
of its own for each of its values.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from precision_lab.nn.numbers import Apart, apart
from precision_lab.policy import Policy
from precision_lab.training.config import ConstantSchedule, RunConfig, SGDConfig
from precision_lab.training.qat import has_state
from precision_lab.training.start import Policies

_FIXED: dict[str, dict[str, Any]] = {
    "optim": {"lr": 1.0, "momentum": 0.5, "weight_decay": 0.5, "b1": 0.9, "b2": 0.9, "eps": 1.0},
    "loss_scale": {"scale": 1.0, "init": 1.0, "growth": 2.0, "backoff": 0.5, "interval": 1, "min": 1.0, "max": 1.0},
}
"""Numbers that are arguments, by part of the config, and the value that stands for all others in `static_part`.

`clip_norm` is structure: where XLA knows it, results differ in the last bit."""

_STRUCTURE = {"b1": (0, 0.5), "b2": (0, 0.5)}
"""Values of a number that are structure, 0 for those that are not here: it switches something off. A decay of a half is
1 - itself, which XLA takes out of the sum as a factor."""

_OF_THE_LOOP: dict[str, Any] = {
    "steps": 1,
    "eval_every": None,
    "eval_at": (),
    "log_every": 50,
    "checkpoint_every": None,
    "eval_examples": 10_000,
    "loss_shift": 0,
    "on_nonfinite": "stop",
}
"""Fields of `train` that no compiled function depends on, or that are an argument (`loss_shift`)."""

_BEFORE_AND_BESIDE: dict[str, Any] = {"start": None, "transforms": (), "evals": Policies()}
"""Fields about what happens before the first step, and about programs of their own beside it."""

_LOOP_CHOICES = {"on_nonfinite": ("stop", "continue")}
"""Values of a field of the loop that are its business alone; others are structure."""


@functools.partial(jax.tree_util.register_dataclass, data_fields=["value", "complement"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Decay:
    """The decay rate of a running mean, for optax: a number b in 1 - b, b * x and b ** n.

    Attributes:
      value: float32, b.
      complement: float32, nearest to 1 - b. In float32 arithmetic 1 - 0.9 would be 0.100000024, and no run would
        give the numbers that it gives when optax is handed 0.9.
    """

    value: Any
    complement: Any

    @classmethod
    def of(cls, b: float) -> Decay:
        """Returns the decay rate `b`."""
        return cls(jnp.float32(b), jnp.float32(1 - b))

    def __rsub__(self, one: int) -> Any:
        assert one == 1, "a decay rate is subtracted from 1 only"
        return self.complement

    def __mul__(self, x: Any) -> Any:
        return self.value * x

    def __pow__(self, n: Any) -> Any:
        return self.value**n


class Hyper(NamedTuple):
    """Numbers of a run that its compiled step takes as arguments, so that runs that differ in them share it.

    Attributes:
      lr: float32, peak learning rate, `loss_shift` included.
      loss_factor: float32, 2**-loss_shift.
      optim: other numbers of the optimizer by field, float32 scalars, or a `Decay` for `b1` and `b2`.
      loss_scale: those of the loss scale by field, float32 scalars, `interval` int32.
      quantizers: those of the policy's quantizers and simulated formats, see `nn.numbers.apart`.
    """

    lr: jax.Array
    loss_factor: jax.Array
    optim: dict[str, Any]
    loss_scale: dict[str, jax.Array]
    quantizers: dict[str, Any]


def hyper(config: RunConfig) -> Hyper:
    """Returns the numbers that `config` passes to its step."""
    config = _as_trained(config)
    shift = config.train.loss_shift
    optim = {name: value for name, value in _numbers(config, "optim").items() if name != "lr"}
    decays = {name: Decay.of(value) for name, value in optim.items() if name in ("b1", "b2")}
    return Hyper(
        # A product with a power of two is exact, so float32 sees the same learning rate with another exponent.
        lr=jnp.float32(config.optim.lr) * jnp.float32(2.0**shift),
        loss_factor=jnp.float32(2.0**-shift),
        optim={name: jnp.float32(value) for name, value in optim.items()} | decays,
        loss_scale={name: _scalar(value) for name, value in _numbers(config, "loss_scale").items()},
        quantizers=jax.tree.map(jnp.asarray, policy_apart(config.policy).numbers),
    )


def static_part(config: RunConfig) -> RunConfig:
    """Returns `config` with everything at a fixed value that is an argument, or that no compiled function sees."""
    values = {name: getattr(config.train, name) for name in _OF_THE_LOOP if name in type(config.train).model_fields}
    train = {name: _OF_THE_LOOP[name] for name, value in values.items() if _is_loops(name, value)}
    config = _as_trained(config)
    if not isinstance(config.optim.schedule, ConstantSchedule):
        del train["steps"]
    return config.model_copy(
        update={
            "seed": 0,
            "policy": str(policy_apart(config.policy).policy),
            "train": config.train.model_copy(update=train),
            **{part: _fixed(config, part) for part in _FIXED},
            **_BEFORE_AND_BESIDE,
        }
    )


def _as_trained(config: RunConfig) -> RunConfig:
    """Returns `config`, with the simplest optimizer if it trains nothing: a schedule of no steps cannot be built."""
    return config if config.train.steps else config.model_copy(update={"optim": SGDConfig(lr=1.0)})


@functools.lru_cache(maxsize=1024)
def policy_apart(policy: str) -> Apart:
    """Returns the structure and the numbers of a policy; all of one whose quantizers have a state is structure."""
    if has_state(policy):
        return Apart(Policy.parse(policy), {}, {})
    return apart(Policy.parse(policy))


def _fixed(config: RunConfig, part: str) -> Any:
    """Returns a part of a config with its numbers at fixed values."""
    return getattr(config, part).model_copy(update={name: _FIXED[part][name] for name in _numbers(config, part)})


def _numbers(config: RunConfig, part: str) -> dict[str, Any]:
    """Returns the numbers of a part of a config that are arguments, in the order of its fields."""
    values = getattr(config, part)
    found = {name: getattr(values, name) for name in type(values).model_fields if name in _FIXED[part]}
    return {name: value for name, value in found.items() if value not in _STRUCTURE.get(name, (0,))}


def _is_loops(name: str, value: Any) -> bool:
    """Returns whether a field of `train` has a value that is the loop's business."""
    return value in _LOOP_CHOICES.get(name, (value,))


def _scalar(value: float) -> jax.Array:
    """Returns a number as the loss scale computes with it."""
    return jnp.int32(value) if isinstance(value, int) else jnp.float32(value)
