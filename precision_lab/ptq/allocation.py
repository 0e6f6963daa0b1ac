"""allocate: spends a budget of true bits on the parameters of a model, where they save the most damage."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from precision_lab.policy import Policy, Treatment
from precision_lab.policy.treatment import SETTINGS
from precision_lab.ptq.scores import Cost, Sensitivity
from precision_lab.rewrite import Site
from precision_lab.rewrite.lookup import LOOKUP
from precision_lab.rewrite.printing import table_text
from precision_lab.rewrite.rules import acts

OBJECTIVES = ("error", "loss")


@dataclasses.dataclass(frozen=True)
class Allocation:
    """A policy for each parameter, and what that costs. Prints as a table.

    Attributes:
      policy: the reference, with a rule for each parameter that has another policy.
      choices: name of the policy of each parameter, by path.
      nbytes: bytes of these parameters, scales and zero points and padding included, as `convert` stores them.
      elements: number of their elements.
      budget_bytes: what was allowed.
      damage: the objective: one-on errors added up, or the increases of the loss.
      uniform: (bytes, damage) with the same policy for every parameter, by name.
      kept: why a parameter saves nothing under a policy that quantizes it, by path and name of the policy: it takes
        what it takes under the reference. A tied embedding under `weight=` alone, say.
    """

    policy: Policy
    choices: dict[str, str]
    nbytes: int
    elements: int
    budget_bytes: int
    damage: float
    uniform: dict[str, tuple[int, float]]
    kept: dict[str, dict[str, str]] = dataclasses.field(default_factory=dict)

    @property
    def bits_per_parameter(self) -> Fraction:
        """The true bits of each of these parameters, exactly."""
        return Fraction(8 * self.nbytes, self.elements)

    def __str__(self) -> str:
        from rich.table import Table

        bits = f"{float(self.bits_per_parameter):.4g} bits per parameter"
        title = f"{bits}: {self.nbytes} of {self.budget_bytes} bytes, damage {self.damage:.4g}"
        table = Table("parameter", "policy", title=title)
        for row in self.choices.items():
            table.add_row(*row)
        for name, (taken, damage) in self.uniform.items():
            table.add_row(f"all under {name}", f"{8 * taken / self.elements:.4g} bits, damage {damage:.4g}")
        for path, by_policy in self.kept.items():
            for name, why in by_policy.items():
                table.add_row(f"{path} under {name}", f"is stored as it is: {why}")
        return table_text(table, width=140)


def allocate(table: Sensitivity, budget_bits: float | Fraction, *, objective: str = "error") -> Allocation:
    """Returns the policy for each parameter that does the least damage within a budget of true bits.

    The damage of an allocation is estimated by its sites one by one: errors of different sites are taken for
    independent, so that their powers in the output add up, which holds to first order. Under that objective the
    result is the best there is, so it is never worse than one policy for all of the same size. Sites without a
    parameter, such as the products of attention, take no bytes and stay under the reference.

    Args:
      table: what `sensitivity` returned; its reference and its policies are what a parameter can have.
      budget_bits: bits per element that the parameters of its sites may take together, everything stored included.
        The allocation never takes more; how much less depends on what the policies store.
      objective: "error", of the output, or "loss", if that was measured; a loss that is no number is an infinite one.

    Raises:
      ValueError: no parameter is quantized at these sites, even the smallest policies take more than the budget, the
        budget is no finite number, or the loss of the reference is none.

    The search is exact: of all ways to choose for the first n parameters it keeps those that no other one beats in
    both bytes and damage, for n = 1, 2, ... It takes memory for as many different sums of bytes as there are.

    Source: Zhou et al., "Adaptive Quantization for Deep Neural Network", 2018, arXiv:1712.01048 (its sections have no
      numbers), adds up the output errors of layers in the same way, and minimises over real bit widths.
    """
    if objective not in OBJECTIVES or (objective == "loss" and not table.has_loss):
        raise ValueError(f"objective={objective!r} must be 'error', or 'loss' where sensitivity was given a loss.")
    if not table.costs:
        raise ValueError("the policies of this table differ at no site with a parameter, so there is nothing to store.")
    if not math.isfinite(budget_bits):
        raise ValueError(f"budget_bits={budget_bits}: expected a finite number of bits per parameter, such as 32.")
    damages = [_damages(table, cost, objective) for cost in table.costs]
    elements = sum(cost.elements for cost in table.costs)
    budget = math.floor(Fraction(budget_bits) * elements / 8)
    least = sum(min(cost.nbytes) for cost in table.costs)
    kept = _kept(table)
    if least > budget:
        raise ValueError(
            f"budget_bits={budget_bits} is {budget} bytes, but these policies store at least {least}: "
            f"{float(Fraction(8 * least, elements)):.4g} bits per parameter. {_way_out(table, kept)}"
        )
    best = _search([cost.nbytes for cost in table.costs], damages, budget)
    rows = list(zip(table.costs, damages, best, strict=True))
    uniform = {
        name: (sum(cost.nbytes[i] for cost in table.costs), sum(damage[i] for damage in damages))
        for i, name in enumerate(table.names)
    }
    choices = {cost.path: table.names[choice] for cost, _, choice in rows}
    taken, damage = sum(cost.nbytes[i] for cost, _, i in rows), sum(damage[i] for _, damage, i in rows)
    return Allocation(_policy(table, best), choices, taken, elements, budget, damage, uniform, kept)


def _kept(table: Sensitivity) -> dict[str, dict[str, str]]:
    """Returns why parameters are stored as they are under policies that quantize them, by path and policy."""
    found: dict[str, dict[str, str]] = {}
    for cost in table.costs:
        tied = len({site.rpartition(":")[2].partition("#")[0] == LOOKUP for site in _uses(table, cost)}) > 1
        hint = "; give its products and its lookups one quantizer: weight= and embedding=" if tied else ""
        reasons = {name: why + hint for name, why in zip(table.names, cost.why_not, strict=False) if why}
        found |= {cost.path: reasons} if reasons else {}
    return found


def _uses(table: Sensitivity, cost: Cost) -> set[str]:
    """Returns the full names of all sites of a parameter, also of those at which no policy differs."""
    return {site.full_name for site in table.tables[0] if site.has_parameter and site.path == cost.path}


def _way_out(table: Sensitivity, kept: dict[str, dict[str, str]]) -> str:
    """Says what lets an allocation take less."""
    for cost in table.costs:
        reasons = kept.get(cost.path, {})
        if reasons and min(cost.nbytes) == cost.nbytes[0]:
            return f"'{cost.path}' saves nothing under {next(iter(reasons))}: {next(iter(reasons.values()))}."
    return "Add a narrower policy to the table."


def _damages(table: Sensitivity, cost: Cost, objective: str) -> list[float]:
    """Returns the damage at the sites of a parameter under the reference, which is none, and under each policy."""
    rows = [[table.at(site, name) for site in cost.sites] for name in table.names[1:]]
    if objective == "error":
        return [0.0, *(sum(row.one_on_error for row in each) for each in rows)]
    before = table.whole[0][1] or 0.0
    if not math.isfinite(before):
        raise ValueError(
            f"the loss under the reference '{table.names[0]}' is {before}, which nothing can be held against."
        )
    harms = [sum((row.one_on_loss or 0.0) - before for row in each) for each in rows]
    return [0.0, *(math.inf if math.isnan(harm) else harm for harm in harms)]


def _search(sizes: Sequence[Sequence[int]], damages: Sequence[Sequence[float]], budget: int) -> list[int]:
    """Returns the choices of least damage, and of these the fewest bytes, whose sizes add up to the budget at most."""
    rest = np.cumsum([0, *(min(each) for each in reversed(sizes))])[::-1]  # least that the remaining ones will take
    taken, damage = np.zeros(1, np.int64), np.zeros(1)
    steps = []
    for number, (size, harm) in enumerate(zip(sizes, damages, strict=True), 1):
        all_taken = (taken[:, None] + np.asarray(size)).ravel()
        all_damage = (damage[:, None] + np.asarray(harm)).ravel()
        kept = _front(all_taken, all_damage, budget - int(rest[number]))
        steps.append(np.divmod(kept, len(size)))
        taken, damage = all_taken[kept], all_damage[kept]
    at, choices = len(taken) - 1, []  # along a front damage falls, so the last one has the least
    for came_from, choice in reversed(steps):
        choices.append(int(choice[at]))
        at = came_from[at]
    return choices[::-1]


def _front(taken: np.ndarray, damage: np.ndarray, limit: int) -> np.ndarray:
    """Returns the indices of what fits and is beaten by no other in both, by rising bytes and falling damage."""
    order = np.lexsort((damage, taken))
    order = order[taken[order] <= limit]
    before = np.concatenate([[np.inf], np.minimum.accumulate(damage[order])[:-1]])
    better = damage[order] < before
    better[:1] = True  # also where every damage is infinite
    return order[better]


def _policy(table: Sensitivity, choices: Sequence[int]) -> Policy:
    """Returns the reference with rules for each parameter that has another policy."""
    policy = table.policies[0]
    for cost, choice in zip(table.costs, choices, strict=True):
        for pattern, change in _rules(table, cost.path, choice).items():
            policy = policy.with_rule(pattern, **change)
    return policy


def _rules(table: Sensitivity, path: str, choice: int) -> dict[str, dict[str, Any]]:
    """Returns the settings that a policy changes at any site of a parameter: by its path, then by site where others.

    A rule by path reaches every site of the parameter, those too at which the policy is as the reference.
    """
    sites = [site for site in table.tables[choice] if site.path == path and site.treatment is not None]
    sites.sort(key=lambda site: site.name != path)  # one whose name is the path can have no rule but that of the path
    chosen = {site.name: _settings(site) for site in sites}
    before = {site.name: _settings(site) for site in table.tables[0] if site.name in chosen}
    changed = {key for name, own in chosen.items() for key in own if own[key] != before[name].get(key)}
    chosen = {name: {key: own[key] for key in own if key in changed} for name, own in chosen.items()}
    common = {key: value for own in reversed(chosen.values()) for key, value in own.items()}
    others = {name: own for name, own in chosen.items() if any(own[key] != common[key] for key in own)}
    return {path: common, **others} if common else {}


def _settings(site: Site) -> dict[str, Any]:
    """Returns the settings of a site that act there."""
    treatment = site.treatment or Treatment()
    found = {key: getattr(treatment, key) for key in SETTINGS}
    return {key: value for key, value in found.items() if acts(site, key, value)}
