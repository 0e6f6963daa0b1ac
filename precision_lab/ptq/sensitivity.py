"""sensitivity: which sites a model can least afford to have quantized, with one program for all sites and policies."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from precision_lab.nn.calibration import arguments, as_call
from precision_lab.nn.carried import refuse_carried
from precision_lab.nn.pure import PureCall, apart, pure_call, signature
from precision_lab.nn.storage import taken_under
from precision_lab.policy import Policy
from precision_lab.policy.deriving import for_inference
from precision_lab.ptq.scores import Cost, Score, Sensitivity
from precision_lab.ptq.waiting import with_bar
from precision_lab.rewrite import (
    OUTPUT,
    SHADOW,
    Choosable,
    Collector,
    Mark,
    call_with_alternatives,
    call_with_choices,
    choosable,
    harvest,
    leaf_names,
    trace,
)

Loss = Callable[[Any, Any], Any]
Totals = collections.defaultdict[Any, float]


def sensitivity(
    target: Any,
    policies: Sequence[Any],
    batches: Iterable[Any],
    *,
    params: Any = None,
    reference: Any = "float32",
    loss: Loss | None = None,
) -> Sensitivity:
    """Returns the damage that each policy does at each site: the site alone under it, and all sites but this one.

    The sites are those at which a policy differs from the reference. All of it is one compiled program, in which an
    integer for each site chooses the policy that it follows, so it takes two runs for each site and policy on each
    batch, and compiles as long as the policies do together. Parameters are stored and outputs cast as the reference
    says; gradients have no part in it.

    Args:
      target: an `nnx.Module`, a `linen.Module`, or a function `fn(params, *args)`; not changed.
      policies: one or more, or what parses to them. They may differ in products and lookups.
      batches: what the model is called with: for each batch its argument, a tuple of arguments, or a dict of keyword
        arguments. With a loss each batch is a pair (inputs, labels), `inputs` being such a batch.
      params: a Linen model's variables, or a function's params.
      reference: the policy that damage is measured against.
      loss: `loss(output, labels)`, a scalar; reported as its mean over the batches.

    Raises:
      TypeError: params are missing or not for this target, or a batch is no pair though there is a loss.
      ValueError: no batches, no policies or the same one twice; policies that differ from the reference at no site, or
        elsewhere than in products and lookups; a rule that matches no site; a model that is converted, trained by
        prepare_qat or has adapters, which would be passed over.
    """
    refuse_carried(target, params, "sensitivity")
    names = (str(reference), *map(str, policies))
    if len(names) < 2 or len(set(names)) < len(names):
        raise ValueError(f"sensitivity needs a reference and other policies, each once, got {', '.join(names)}.")
    parsed = [for_inference(Policy.parse(policy)) for policy in (reference, *policies)]
    parsed = [parsed[0], *(_stored_like(policy, parsed[0]) for policy in parsed[1:])]
    totals, run, first, count = Totals(float), None, None, 0
    for batch in batches:
        (args, kwargs), labels = _split(batch, loss)
        pure = pure_call(target, *arguments(target, params, args, kwargs))
        if run is None:
            first = args, kwargs
            run = _Run(parsed, loss, _choosable(pure, parsed, names), {})
        _add(totals, run, pure, labels)
        count += 1
    if run is None:
        raise ValueError("sensitivity got no batches; give at least one, such as [x] or a list of tuples of arguments.")
    costs = _costs(target, parsed, params, first, run.found)
    return _table(totals, count, run.found, names, parsed, costs, loss is not None)


def _stored_like(policy: Policy, reference: Policy) -> Policy:
    """Returns a policy whose parameters and outputs are the reference's."""
    return dataclasses.replace(policy, params=reference.params, output=reference.output)


def _split(batch: Any, loss: Loss | None) -> tuple[tuple[tuple[Any, ...], dict[str, Any]], Any]:
    """Returns the call of a batch, and its labels."""
    if loss is None:
        return as_call(batch), None
    if not isinstance(batch, tuple) or len(batch) != 2:
        raise TypeError(f"with a loss each batch is a pair (inputs, labels), got {type(batch).__name__}.")
    return as_call(batch[0]), batch[1]


def _choosable(pure: PureCall, policies: Sequence[Policy], names: Sequence[str]) -> Choosable:
    """Returns where policies differ.

    Raises:
      ValueError: nowhere.
    """
    found = choosable(pure.fn, policies, pure.params, pure.args, pure.kwargs, **_named(pure))
    if not found.sites:
        kept = f" ('{found.kept[0]}' is inside a custom derivative, which keeps the reference)" if found.kept else ""
        raise ValueError(f"'{', '.join(names[1:])}' and the reference '{names[0]}' differ at no site{kept}.")
    return found


class _Run(NamedTuple):
    """What a model is run with.

    Attributes:
      policies, loss: as in `sensitivity`; the reference is the first of the policies.
      found: where they differ.
      compiled: programs, by the structure and shapes of a batch.
    """

    policies: list[Policy]
    loss: Loss | None
    found: Choosable
    compiled: dict[Any, Any]

    def programs(self, pure: PureCall, labels: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """Returns two functions: from choices to the output and loss of a batch, and to the powers at its sites."""
        given = (pure.params, pure.args, pure.kwargs, labels)
        arrays, together = apart(given)
        if (key := (pure.called, signature(given))) not in self.compiled:
            self.compiled[key] = jax.jit(self._chosen(pure, together)), jax.jit(self._powers(pure, together))
        chosen, powers = self.compiled[key]
        return (lambda choices: chosen(choices, arrays)), (lambda: powers(arrays))

    def _chosen(self, pure: PureCall, together: Callable[[list[Any]], Any]) -> Callable[..., Any]:
        def run(choices: jax.Array, arrays: list[Any]) -> tuple[list[jax.Array], Any]:
            params, args, kwargs, labels = together(arrays)
            by_site = dict(zip(self.found.sites, choices, strict=True))
            out = call_with_choices(
                pure.fn, self.policies, by_site, pure.stored(self.policies[0], params), args, kwargs, **_named(pure)
            )
            out = self.policies[0].cast_to_output(out)
            floating = [leaf for leaf in jax.tree.leaves(out) if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)]
            return floating, None if self.loss is None else jnp.asarray(self.loss(out, labels), jnp.float32)

        return run

    def _powers(self, pure: PureCall, together: Callable[[list[Any]], Any]) -> Callable[..., Any]:
        def run(arrays: list[Any]) -> dict[str, jax.Array]:
            params, args, kwargs, _ = together(arrays)

            def fn(params: Any) -> Any:
                return call_with_alternatives(pure.fn, self.policies, params, args, kwargs, **_named(pure))

            traced = trace(fn, pure.stored(self.policies[0], params), (), {})
            _, powers = harvest(traced.jaxpr, traced.arrays, Collector(_wanted, _measured, jnp.add, _zero))
            return {f"{mark.site}\n{mark.role}": power for mark, power in powers.items()}

        return run


def _named(pure: PureCall) -> dict[str, Any]:
    """Returns how the sites of a call are named."""
    return {"root": pure.root, "types": pure.types}


def _wanted(mark: Mark) -> bool:
    return mark.role == OUTPUT or mark.role.startswith(SHADOW)


def _zero(like: Any) -> jax.Array:
    return jnp.zeros(like.shape, like.dtype)


def _measured(pairs: Sequence[tuple[Mark, jax.Array]]) -> list[jax.Array]:
    """Returns the power of each output, and of the difference from it for what it would be under other policies."""
    outputs = {mark.site: x for mark, x in pairs if mark.role == OUTPUT}
    return [_power(x, jnp.zeros_like(x)) if mark.role == OUTPUT else _power(x, outputs[mark.site]) for mark, x in pairs]


def _power(x: jax.Array, reference: jax.Array) -> jax.Array:
    """Returns the sum of squares of a difference, float32, over the elements that are finite in the reference."""
    known = jnp.isfinite(reference)
    difference = jnp.where(known, x.astype(jnp.float32) - jnp.where(known, reference, 0).astype(jnp.float32), 0)
    return jnp.sum(difference**2)


_power_of = jax.jit(lambda found, expected: sum(map(_power, found, expected)))


def _add(totals: Totals, run: _Run, pure: PureCall, labels: Any) -> None:
    """Adds what one batch gives: powers and losses by what was chosen, and powers by site."""
    chosen, powers = run.programs(pure, labels)
    sites = len(run.found.sites)
    expected, _ = chosen(np.zeros(sites, np.int32))
    totals["signal"] += float(_power_of(expected, [jnp.zeros_like(leaf) for leaf in expected]))
    cases = list(_cases(sites, len(run.policies) - 1))
    for key, choices in with_bar(cases, len(cases), "sensitivity"):
        out, loss = chosen(choices)
        totals["error", key] += _number(_power_of(out, expected))
        totals["loss", key] += 0.0 if loss is None else float(loss)
    for key, power in powers().items():
        totals["local", *key.split("\n")] += _number(power)


def _number(power: Any) -> float:
    """Returns a sum of squares; one that is no number is infinite."""
    return math.inf if math.isnan(float(power)) else float(power)


def _cases(sites: int, policies: int) -> Iterator[tuple[Any, np.ndarray]]:
    """Yields what is run, by name, and the policy of each site in it; 0 is the reference."""
    for policy in range(policies + 1):
        yield ("whole", policy), np.full(sites, policy, np.int32)
    for site in range(sites):
        for policy in range(1, policies + 1):
            alone = np.where(np.arange(sites) == site, policy, 0).astype(np.int32)
            yield ("on", site, policy), alone
            yield ("off", site, policy), (policy - alone).astype(np.int32)


def _table(
    totals: Totals,
    batches: int,
    found: Choosable,
    names: tuple[str, ...],
    policies: Sequence[Policy],
    costs: tuple[Cost, ...],
    has_loss: bool,
) -> Sensitivity:
    """Returns the scores from what was added up."""

    def error(*key: Any) -> float:
        return _ratio(totals["error", key], totals["signal"])

    def loss(*key: Any) -> float | None:
        return totals["loss", key] / batches if has_loss else None

    rows = []
    for i, site in enumerate(found.sites):
        for number, name in enumerate(names[1:], 1):
            on, off = ("on", i, number), ("off", i, number)
            local = _ratio(totals["local", site, f"{SHADOW}{number - 1}"], totals["local", site, OUTPUT])
            rows.append(Score(site, name, error(*on), error(*off), local, loss(*on), loss(*off)))
    whole = tuple((error("whole", number), loss("whole", number)) for number in range(len(names)))
    return Sensitivity(tuple(rows), names, tuple(policies), whole, costs, found.tables, found.kept)


def _ratio(noise: float, signal: float) -> float:
    """Returns a relative error; infinite for any at all where there is no signal."""
    return noise / signal if signal else (math.inf if noise else 0.0)


def _costs(target: Any, policies: Sequence[Policy], params: Any, first: Any, found: Choosable) -> tuple[Cost, ...]:
    """Returns what the parameters at the sites take under each policy."""
    taken = [taken_under(target, policy, params, *first) for policy in policies]
    pure = pure_call(target, *arguments(target, params, *first))
    sizes = dict(zip(leaf_names(pure.params), map(np.size, jax.tree.leaves(pure.params)), strict=True))
    by_path: dict[str, list[str]] = {}
    for site in found.tables[0]:
        if site.has_parameter and site.name in found.sites:
            by_path.setdefault(site.path, []).append(site.name)
    return tuple(
        Cost(path, tuple(sites), sizes[path], *zip(*(under[path] for under in taken), strict=True))
        for path, sites in by_path.items()
    )
