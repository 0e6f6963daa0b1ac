"""Rules against the sites that they match: what would do nothing is refused, so that no setting is passed over."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

from precision_lab.policy import Policy
from precision_lab.policy.policy import Rule
from precision_lab.policy.treatment import QUANTIZERS, SETTINGS
from precision_lab.rewrite import _compat
from precision_lab.rewrite.lookup import LOOKUP
from precision_lab.rewrite.sites import Site

# Of one operand each; a rule that says several is a recipe for a part of a model, of which some kinds may be absent.
OF_OPERANDS = tuple(key for key in QUANTIZERS if key != "gradient")


def require_every_rule_used(policy: Policy, sites: Sequence[Site]) -> None:
    """Raises ValueError for a rule that does nothing, or says something that does nothing or contradicts another one.

    That is a rule that matches no site, only sites that are left alone, or only sites at which one of its settings
    has nothing to act on. Settings that are switched off, such as `weight=none`, may be anywhere.
    """
    unused = [rule for rule in policy.rules if not any(rule.matches(*site.names) for site in sites)]
    if unused:
        raise ValueError(_unused_message(unused[0].pattern, len(unused), len(policy.rules), sites))
    for site in sites if policy.rules else ():
        if site.is_product and site.treatment is not None:
            policy.check_at(site.treatment, site.names)
    for rule in policy.rules:
        matched = [site for site in sites if rule.matches(*site.names)]
        never = rule.sets("op") and dict(rule.settings)["op"] == "never"
        left_alone = never or all(value is None for _, value in rule.settings)  # which is what it asked for
        if all(site.reason for site in matched) and not left_alone:
            why = f"{matched[0].name}: {matched[0].reason}"
            raise ValueError(f"rule '{rule.pattern}' matches only sites that cannot be cast ({why}).")
        if kept := [site for site in matched if not site.reason]:
            _require_effect(rule, kept)


def acts(site: Site, key: str, value: Any) -> bool:
    """Returns whether a setting has something to act on at a site, or switches something off."""
    by = site.quantized_by
    if value is None or site.treatment is None:
        return True
    if key == "round":
        return site.treatment.round is not None  # None inside of what is rounded as a whole
    if key in OF_OPERANDS:
        return key in by
    if key == "op":
        return not site.is_product and (site.op not in _compat.CLOSED or value == site.treatment.op)
    if key == "compute":
        return site.is_product or site.treatment.op == "low"
    if key in ("dgrad", "wgrad"):
        return bool({"wgrad": {"weight"}, "dgrad": {"activation", "attention"}}[key].intersection(by))
    if key == "outliers":
        return {"weight", "activation"} <= set(by) and None not in (site.treatment.weight, site.treatment.activation)
    quantized = any(getattr(site.treatment, role) is not None for role in (*by, "gradient"))
    return site.is_product and (key != "backward" or quantized)


def _require_effect(rule: Rule, sites: Sequence[Site]) -> None:
    """Raises ValueError if a setting of a rule acts on none of its sites."""
    for key, value in rule.settings:
        alike = OF_OPERANDS if key in OF_OPERANDS else (key,)
        said = [pair for pair in rule.settings if pair[0] in alike and pair[1] is not None]
        if not any(acts(site, *pair) for site in sites for pair in said or [(key, value)]):
            raise ValueError(
                f"rule '{rule.pattern}' sets {key}={SETTINGS[key].show(value)}, which acts on none of the "
                f"{len(sites)} sites that it matches: '{sites[0].name}' {_instead(sites[0], key)}."
            )


def _instead(site: Site, key: str) -> str:
    """Says what a site is and which settings there are for it, instead of one."""
    if key == "round":
        return "is inside a function with rules of its own, which is rounded as a whole: say its name, as in **:relu#*"
    if key == "op" and site.is_product:
        return "is a product, and op= is for other operations: say compute= or leave it out"
    if site.op in _compat.CLOSED:
        return "has rules of its own, which are typed for what was traced: say round= or leave it out"
    if site.op == LOOKUP and site.quantized_by:
        return "is a lookup of parameters: say embedding= or leave it out"
    if not site.is_product:
        return "is no product: say op= or round= or leave it out"
    operands = " and ".join(f"{key}=" for key in dict.fromkeys(site.quantized_by))
    return f"is a product whose operands are quantized by {operands}: say these or leave it out"


def _unused_message(pattern: str, unused: int, total: int, sites: Sequence[Site]) -> str:
    """Says which rule matched nothing and what it may have meant."""
    names = list(dict.fromkeys(site.name for site in sites))
    if not names:
        return f"rule '{pattern}' matched no site: the computation has no products."
    types = list(dict.fromkeys(name for site in sites for name in site.names if name[:1] == "@"))
    kind, known = ("module type around a site", types) if pattern[:1] == "@" and types else ("site", names)
    literal = pattern.replace("**/", "").replace("/**", "")
    near = difflib.get_close_matches(literal, known, n=1, cutoff=0) or known[:1]
    return f"{unused} of {total} rules matched no site: '{pattern}'. Nearest {kind}: '{near[0]}'."
