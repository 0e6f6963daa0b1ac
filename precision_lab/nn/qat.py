"""Quantization-aware training by policy: what quantizers learn, and their running ranges, beside the parameters.

    qat = pl.QAT("weight=int4@channel,lsq,activation=int8@tensor,ema")
    state = qat.init(loss_fn, params, batch)
    step = jax.jit(qat.value_and_grad(loss_fn))
    (loss, (grads, learned_grads)), state = step(params, state, batch)

The state is a pytree that a training step carries and checkpoints: `state["learned"]` holds numbers that gradients flow
to, for the optimizer, `state["running"]` those that a step of training moves itself. Both are dicts by site and operand
("lhs", "rhs") of what a `QuantizerState` holds; every value is that of `quant.quantize_with_state`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from precision_lab.nn.qat_marks import read_starts, read_steps, wants_state
from precision_lab.policy import Policy
from precision_lab.quant import Quantizer, QuantizerState, known_scales, needs_state
from precision_lab.quant.state import check_schedule
from precision_lab.rewrite import Held, SiteTable, call, sites_of_function, trace_program
from precision_lab.rewrite.marks import OPERANDS

State = dict[str, dict[str, dict[str, dict[str, Any]]]]  # "learned" or "running", site, operand, name


@dataclasses.dataclass(frozen=True)
class QAT:
    """Training of a quantized function `fn(params, *args)`, for a policy whose quantizers have a state.

    A scan that slices parameters is one over layers: each of its layers has quantizers of its own, whose state has a
    leading axis for them. In any other scan all iterations share one: each quantizes with the range after its own
    look, and afterwards the range has moved once, to the mean of theirs. A site in a branch that is not taken keeps
    its state; what it learns starts at the scale 1 if the branch is not taken in `init`.

    Attributes:
      policy: a Policy or what parses to one, with a quantizer of estimator "lsq", "lsq+" or "pact" or calibration
        "ema", as in "weight=int4@channel,lsq,activation=uint8,ema".
      delay: training steps, at first, in which nothing is quantized; ranges are collected already.
      freeze: training steps after which ranges and what is learned stay as they are, whatever an optimizer makes of
        `state["learned"]` from then on: its momentum and weight decay go on. None for never.
      momentum: how far an "ema" range moves towards each array, in (0, 1].

    Raises:
      ValueError, TypeError: a schedule that is none.

    Source: Esser et al., "Learned Step Size Quantization", 2020, arXiv:1902.08153; Bhalgat et al., "LSQ+", 2020,
      arXiv:2004.09576; Choi et al., "PACT", 2018, arXiv:1805.06085; Jacob et al., "Quantization and Training of Neural
      Networks for Efficient Integer-Arithmetic-Only Inference", 2018, arXiv:1712.05877, section 3.1, for running
      ranges and the delay.
    """

    policy: Any
    delay: int = 0
    freeze: int | None = None
    momentum: float = 0.1

    def __post_init__(self) -> None:
        object.__setattr__(self, "policy", Policy.parse(self.policy))
        check_schedule(self.delay, self.freeze, self.momentum)

    @property
    def schedule(self) -> tuple[Any, ...]:
        """What it says besides the policy."""
        return self.delay, self.freeze, self.momentum

    def init(self, fn: Callable[..., Any], params: Any, *args: Any, **kwargs: Any) -> State:
        """Returns the state before the first step, from one pass in which these quantizers let everything through.

        What is learned starts from what each quantizer is given there, weights or activations; ranges begin empty.

        Args:
          fn: function of params and what follows.
          params, args, kwargs: what it is called with: arrays with real data.

        Raises:
          ValueError: no quantizer of the policy has a state, or one has it where the policy leaves no place for it.
        """
        return self.started(fn, params, args, kwargs)

    def apply(self, fn: Callable[..., Any], *, train: bool = True) -> Callable[..., Any]:
        """Returns `run(params, state, *args, **kwargs) -> (out, state after it)`, with `fn` under the policy.

        `run` can be jitted, batched and differentiated in params and in `state["learned"]`; the state after it comes
        with no gradient. In evaluation the state comes back as it was.

        Args:
          fn: as in `init`.
          train: whether this is a step of training.
        """

        def run(params: Any, state: State, *args: Any, **kwargs: Any) -> tuple[Any, State]:
            out, after = self.stepped(fn, params, args, kwargs, state, train=train)
            return self.policy.cast_to_output(out), after

        return run

    def value_and_grad(self, fn: Callable[..., Any], *, has_aux: bool = False) -> Callable[..., Any]:
        """Returns `(params, state, *args) -> ((value, (gradients, gradients of state["learned"])), state after it)`.

        Args:
          fn: function to a scalar loss, or to (loss, auxiliary data).
          has_aux: whether it returns auxiliary data; then value is (loss, auxiliary data).
        """
        run = self.apply(fn)

        def step(params: Any, state: State, *args: Any) -> Any:
            def loss(params: Any, learned: Any) -> Any:
                out, after = run(params, {**state, "learned": learned}, *args)
                return (out[0], (out, after)) if has_aux else (out, (out, after))

            (_, (out, after)), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(params, state["learned"])
            return (out, grads), after

        return step

    def started(self, fn: Any, params: Any, args: Sequence[Any], kwargs: Any, **options: Any) -> State:
        """Returns the state before the first step; `options` are of `rewrite.call`, for the calls of models."""
        own = {key: options[key] for key in ("root", "types") if key in options}
        table = sites_of_function(fn, self.policy, params, args, kwargs, **own)
        given = {site: dict.fromkeys(roles, Held(freeze=self.freeze)) for site, roles in self.quantizers(table).items()}

        def run(params: Any, args: Any, kwargs: Any) -> Any:
            return call(fn, self.policy, params, args, kwargs, given=given, **options)

        traced = trace_program(run, (params, args, kwargs), {})
        found = jax.jit(lambda arrays: read_starts(traced, arrays)[1])(traced.arrays)
        state: State = {"learned": {}, "running": {}}
        for (site, role), held in found.items():
            for kind, numbers in held._asdict().items():
                if numbers:
                    state[kind].setdefault(site, {})[role] = numbers
        return state

    def stepped(
        self, fn: Any, params: Any, args: Sequence[Any], kwargs: Any, state: State, *, train: bool, **options: Any
    ) -> tuple[Any, State]:
        """Returns what `fn` returns, in its own dtypes, and the state after it; `options` as in `started`."""

        def run(params: Any, state: State, args: Any, kwargs: Any) -> Any:
            return call(fn, self.policy, params, args, kwargs, given=self.held(state, train=train), **options)

        if not train:
            return run(params, state, args, kwargs), state
        traced = trace_program(run, (params, state, args, kwargs), {})
        out, running = read_steps(traced, traced.arrays, state["running"])
        return traced.rebuild(out), {**state, "running": running}

    def held(self, state: State, *, train: bool) -> dict[str, dict[str, Held]]:
        """Returns a state as the rewrite takes it."""
        schedule = {"train": train, "delay": self.delay, "freeze": self.freeze, "momentum": self.momentum}
        return {
            site: {role: Held(_state_of(state, site, role), **schedule) for role in roles}
            for site, roles in state["running"].items()
        }

    def quantizers(self, table: SiteTable) -> dict[str, dict[str, Quantizer]]:
        """Returns the quantizers that have a state, by site and operand; under a delay these are all.

        Raises:
          ValueError: there are none, or one where the policy leaves no place for a state.
        """
        found: dict[str, dict[str, Quantizer]] = {}
        for site in table:
            if site.treatment is None:
                continue
            by = [(role, getattr(site.treatment, key)) for role, key in zip(OPERANDS, site.quantized_by, strict=False)]
            roles = {role: qz for role, qz in by if qz is not None and (self.delay or needs_state(qz))}
            wants_state(site, roles, self.delay)
            found |= {site.name: roles} if roles else {}
        if not found:
            raise ValueError(
                f"policy '{self.policy}' has no quantizer with a state at any site, so apply_policy is all it needs; "
                "a state is what 'lsq', 'lsq+' and 'pact' learn, or a running range, 'ema'."
            )
        return found


def static_scales(state: State, table: SiteTable) -> dict[str, dict[str, dict[str, Any]]]:
    """Returns scale, zero point and offset of each quantizer that a state fixes, by site and operand.

    Raises:
      ValueError: a running range that no step of training has moved yet.
    """
    scales: dict[str, dict[str, dict[str, Any]]] = {}
    for site in table:
        for role, key in zip(OPERANDS, site.quantized_by, strict=False):
            if role in state["running"].get(site.name, {}):
                held = _state_of(state, site.name, role)
                if "updates" in held.running and not np.all(np.asarray(held.running["updates"])):
                    raise ValueError(f"'{site.name}' {role} has no range yet: train the model before it is converted.")
                if known := _known(getattr(site.treatment, key), held):
                    scales.setdefault(site.name, {})[role] = known
    return scales


def _known(qz: Quantizer, held: QuantizerState) -> dict[str, Any]:
    """Returns what a state says of scales; an array of it has the axes of scans over layers first."""
    return {name: jnp.asarray(value) for name, value in known_scales(qz, held).items()}


def _state_of(state: Mapping[str, Any], site: str, role: str) -> QuantizerState:
    """Returns the state of one quantizer."""
    return QuantizerState(state["learned"].get(site, {}).get(role, {}), state["running"][site][role])
