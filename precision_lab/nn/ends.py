"""Rules that keep the first and the last layer of a model in full precision, as low-bit papers do."""

from __future__ import annotations

import dataclasses
from typing import Any

from precision_lab.nn.apply import sites
from precision_lab.policy import Policy
from precision_lab.policy.treatment import QUANTIZERS

ENDS = ("first", "last")


def keep_ends(policy: Any, target: Any, *args: Any, ends: tuple[str, ...] = ENDS, **kwargs: Any) -> Policy:
    """Returns the policy with rules that quantize nothing in the first and in the last layer that has a parameter.

    "First" and "last" go by the order in which the products run, so give the arguments that the model is called with;
    nothing is executed. The rules name the layers' parameters, as one could by hand:
    `"xnor;layers/0/kernel:weight=none,activation=none;head/kernel:weight=none,activation=none"`.

    Args:
      policy: a Policy or what parses to one.
      target, args, kwargs: the model or function and its arguments, as of `sites`.
      ends: which to keep, of "first" and "last".

    Raises:
      ValueError: `ends` has another word; the policy quantizes nothing; the model has no product with a parameter.

    Source: Rastegari et al., "XNOR-Net", 2016, arXiv:1603.05279, section 4.1, for both ends.
    """
    policy = Policy.parse(policy)
    if not ends or any(end not in ENDS for end in ends):
        raise ValueError(f"ends must be of {', '.join(ENDS)}, got {ends!r}.")
    if not policy.quantizes:
        raise ValueError(f"policy '{policy}' quantizes nothing, so there is nothing to keep its ends from.")
    plain = dataclasses.replace(policy, rules=())
    found = [
        site.path for site in sites(target, *args, policy=plain, **kwargs) if site.has_parameter and site.is_product
    ]
    if not found:
        raise ValueError("the computation has no product with a parameter, and so neither first nor last layer.")
    settings = {key: None for key in (*QUANTIZERS, "backward") if getattr(policy, key) is not None}
    for path in dict.fromkeys(found[0 if end == "first" else -1] for end in ends):
        policy = policy.with_rule(path, **settings)
    return policy
