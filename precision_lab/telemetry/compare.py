"""compare: the error that a policy makes at each site by itself, and the error that has piled up there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from precision_lab.nn.pure import PureCall
from precision_lab.policy import Policy
from precision_lab.rewrite import OUTPUT, SHADOW, Collector, Mark, harvest, observing, trace_program
from precision_lab.rewrite.printing import table_text
from precision_lab.telemetry.observe import run_under
from precision_lab.telemetry.statistics import thinned

Values = dict[tuple[str, str], np.ndarray]


@dataclass(frozen=True)
class Difference:
    """How far a tensor is from the reference; over the elements that are finite in the reference.

    Attributes:
      sqnr_db: power of the reference over that of the difference, in dB; infinite where they are equal.
      max_abs: largest difference.
      max_rel: largest difference relative to the reference, where that is not zero.
    """

    sqnr_db: float
    max_abs: float
    max_rel: float


@dataclass(frozen=True)
class Compared:
    """The errors of one policy at one site.

    Attributes:
      site: its name; "output/..." for what the function returns.
      policy: the policy, as it was given; for a model its place, such as "model 1".
      local: error of this product alone, from the operands of the reference; None for what the function returns, and
        for the products of a model that is compared as it is.
      cumulative: error in a run wholly under the policy.
    """

    site: str
    policy: str
    local: Difference | None
    cumulative: Difference


@dataclass(frozen=True)
class Comparison(Sequence[Compared]):
    """Errors by site, in program order, and by policy. Prints as a table."""

    rows: tuple[Compared, ...]
    reference: str

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return self.rows[index]

    def at(self, site: str, policy: Any) -> Compared:
        """Returns the row of a site and a policy.

        Raises:
          KeyError: there is none.
        """
        name = str(policy)
        for row in self.rows:
            if (row.site, row.policy) == (site, name):
                return row
        raise KeyError(f"no site '{site}' under policy '{name}'; sites are {', '.join(self.sites)}.")

    @property
    def sites(self) -> list[str]:
        """The sites, once each, in program order."""
        return list(dict.fromkeys(row.site for row in self.rows))

    def to_dicts(self) -> list[dict[str, Any]]:
        """Returns one plain dictionary per row."""
        kinds = ("local", "cumulative")
        return [
            {"site": row.site, "policy": row.policy}
            | {f"{kind}_{k}": v for kind in kinds if (d := getattr(row, kind)) for k, v in asdict(d).items()}
            for row in self.rows
        ]

    def frame(self) -> Any:
        """Returns the table as a pandas DataFrame.

        Raises:
          ImportError: pandas is not installed.
        """
        try:
            import pandas as pd  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ImportError("compare(...).frame() needs pandas: pip install 'precision-lab[notebook]'.") from error
        return pd.DataFrame(self.to_dicts())

    def __str__(self) -> str:
        from rich.table import Table

        numbers = [f"{kind}: {name}" for kind in ("local", "cumulative") for name in ("SQNR dB", "max abs", "max rel")]
        table = Table("site", "policy", *numbers, title=f"errors against {self.reference}")
        for row in self.rows:
            table.add_row(row.site, row.policy, *_cells(row.local), *_cells(row.cumulative))
        return table_text(table, width=180)


def compare(
    target: Any,
    policies: Sequence[Any],
    *args: Any,
    loss: Callable[[Any], Any] | None = None,
    limit: int | None = 65536,
    **kwargs: Any,
) -> Comparison:
    """Returns the errors of policies against the first of them, at every site of `target`.

    The local error of a site is that of its product alone: both policies get the operands that the reference has
    there. The cumulative error is what has piled up: the same output in a run that is wholly under the policy. A site
    with a small local and a large cumulative error only suffers from others.

    Args:
      target: an `nnx.Module`, a `linen.Module` or a function `fn(params, *args, **kwargs)`; none is changed. For errors
        of gradients give a function that differentiates: its backward products are sites too.
      policies: two or more, or what parses to them; the first is the reference. Also models with the sites of
        `target`, which are run as they are, with all that they carry: `pl.compare(model, ["float32", packed], x)` for
        one that `convert` returned, of Linen or a function with its params, `(module, variables)`.
      args, kwargs: what it is called with, as in `observe`.
      loss: makes what is compared in the end of the output.
      limit: compare so many elements of a tensor at most, evenly spread (in a scan, of each iteration); None takes all.
        Of a while loop the last iteration is compared.

    Raises:
      TypeError: `target` is no model or function.
      ValueError: fewer than two policies, a rule that matches no site, or a model with other sites.
    """
    if len(policies) < 2:
        raise ValueError(f"compare needs a reference and at least one other policy, got {len(policies)} in all.")
    arms = [_arm(f"model {i}", each, target, args, kwargs, loss) for i, each in enumerate(policies)]
    shadows = [i for i, arm in enumerate(arms) if i and arm.policy is not None]
    base = _values(arms[0], limit, tuple(arms[i].policy for i in shadows))
    runs = {i: _values(arm, limit, ()) for i, arm in enumerate(arms) if i}
    rows = []
    for site in [site for site, role in base if role == OUTPUT]:
        for i, run in runs.items():
            local = base.get((site, f"{SHADOW}{shadows.index(i)}")) if i in shadows else None
            rows.append(Compared(site, arms[i].name, *_errors(base, local, run, site, arms[i].name)))
    return Comparison(tuple(rows), arms[0].name)


class _Arm(NamedTuple):
    """One run of a comparison: under a policy, or a model as it is, whose policy is None here."""

    name: str
    policy: Policy | None
    forward: Callable[..., Any]
    pure: PureCall


def _arm(name: str, policy: Any, target: Any, args: Any, kwargs: Any, loss: Callable[[Any], Any] | None) -> _Arm:
    """Returns the run of what stands for a policy; a model goes by a name."""
    if not _is_model(policy):
        parsed = Policy.parse(policy)
        return _Arm(str(policy), parsed, *run_under(target, args, kwargs, parsed, loss))
    if isinstance(policy, tuple):
        policy, args = policy[0], (policy[1], *args[1:])
    return _Arm(name, None, *run_under(policy, args, kwargs, None, loss))


def _is_model(policy: Any) -> bool:
    """Returns whether what stands for a policy is a model, or a function or a Linen module with its params."""
    return isinstance(policy, nnx.Module) or (isinstance(policy, tuple) and len(policy) == 2 and callable(policy[0]))


def difference(reference: np.ndarray, other: np.ndarray) -> Difference:
    """Returns how far an array is from a reference; computed in float64. A difference that is no number is infinite."""
    known = np.isfinite(reference)
    expected = reference[known].astype(np.float64)
    error = np.abs(other[known].astype(np.float64) - expected)
    error = np.where(np.isnan(error), np.inf, error)
    with np.errstate(divide="ignore", invalid="ignore"):
        signal, noise = np.sum(expected**2), np.sum(error**2)
        sqnr_db = 10 * np.log10(signal / noise) if noise else np.inf
        relative = (error / np.abs(expected))[expected != 0]
    return Difference(float(sqnr_db), float(np.max(error, initial=0)), float(np.max(relative, initial=0)))


def _errors(
    base: Values, shadow: np.ndarray | None, run: Values, site: str, name: str
) -> tuple[Difference | None, Difference]:
    """Returns the local error at a site, which what the function returns does not have, and the cumulative one."""
    expected, found = base[site, OUTPUT], run.get((site, OUTPUT))
    if found is None or found.shape != expected.shape:
        raise ValueError(f"'{site}' is no site of '{name}': give a model of the same code.")
    return None if shadow is None else difference(expected, shadow), difference(expected, found)


def _values(arm: _Arm, limit: int | None, shadows: tuple[Any, ...]) -> Values:
    """Returns the outputs of all sites in a run, those of other policies there, and what the function returns."""
    with observing(shadows):
        traced = trace_program(arm.forward, (arm.pure.params, *arm.pure.args), arm.pure.kwargs)
    marks: list[Mark] = []

    def wanted(mark: Mark) -> bool:
        return mark.role == OUTPUT or mark.role.startswith(SHADOW)

    def measure(pairs: Sequence[tuple[Mark, jax.Array]]) -> list[jax.Array]:
        return [thinned(x, limit).ravel() for _, x in pairs]

    @jax.jit
    def run(arrays: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        out, found = harvest(traced.jaxpr, arrays, Collector(wanted, measure, lambda _, b: b, _zeros, stacked=True))
        marks[:] = found
        return out, list(found.values())

    out, collected = jax.device_get(run(traced.arrays))
    values = {(mark.site, mark.role): value for mark, value in zip(marks, collected, strict=True)}
    leaves = jax.tree.leaves_with_path(traced.rebuild(out))
    names = [jax.tree_util.keystr(tuple(path), simple=True, separator="/") for path, _ in leaves]
    results = {
        ("/".join(filter(None, ("output", name))), OUTPUT): np.asarray(leaf)
        for name, (_, leaf) in zip(names, leaves, strict=True)
        if jax.numpy.issubdtype(np.asarray(leaf).dtype, np.inexact)
    }
    return values | results


def _zeros(like: Any) -> jax.Array:
    """Returns what stands for the outputs of a branch that was not taken."""
    return jax.numpy.zeros(like.shape, like.dtype)


def _cells(found: Difference | None) -> list[str]:
    """Writes a difference."""
    return ["", "", ""] if found is None else [f"{found.sqnr_db:.1f}", f"{found.max_abs:.3g}", f"{found.max_rel:.3g}"]
