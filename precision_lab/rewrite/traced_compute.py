"""Products under a compute format whose numbers are data, so that a sweep over formats is one program.

A simulated product rounds its operands to the format, and in its gradients the cotangent too. Both can be done around
a product in float32, by two functions that are each other's transposes: one rounds its operand and passes cotangents
on, the other passes its operand on and rounds cotangents. Tangents of operands are rounded like operands.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from precision_lab.formats import FormatParams, format, round_to
from precision_lab.policy import Policy, Treatment
from precision_lab.rewrite._adjoints import adjoint_primitives
from precision_lab.rewrite.cast import Casting, as_result
from precision_lab.rewrite.held import Known, numbers_key
from precision_lab.rewrite.sites import Site

# Rounding to it changes none of the values of a format that is traced. It stands where a static format would round, so
# that XLA finds the same operations around the same products, and sums them in the same order.
WIDEST = format("e8m22")
_rounded, _rounding_cotangents = adjoint_primitives(
    ("policy_round", "policy_round_cotangent"), lambda x, *leaves: round_to(x, FormatParams(*leaves))
)
Product = Callable[[jax.Array, jax.Array, Casting], jax.Array]


def product_under_params(product: Product, lhs: jax.Array, rhs: jax.Array, how: Casting, fmt: FormatParams) -> Any:
    """Returns what `product(lhs, rhs, how)` would be if `how.compute` were the format of `fmt`, simulated.

    Args:
      product: takes a product in float32.
      lhs, rhs: the operands.
      how: how it is computed; no operand nor cotangent has a quantizer.
      fmt: numbers of a format for float32 arrays, which may be traced.
    """
    plain = {**dict.fromkeys(("compute", "dgrad", "wgrad"), WIDEST), "native": False, "result": np.dtype(np.float32)}
    leaves = tuple(map(jnp.asarray, fmt))
    left, right = (_rounded(x.astype(jnp.float32), *leaves) for x in (lhs, rhs))
    out = product(left, right, dataclasses.replace(how, **plain))
    return as_result(_rounding_cotangents(out, *leaves), how)


def compute_params(
    known: Known, policy: Policy, site: Site, treatment: Treatment, call: Sequence[Site] | None
) -> FormatParams | None:
    """Returns the numbers of the compute format of a product, None if they are its own.

    Args:
      known: everything that is given.
      policy, site, treatment: the product, and what the policy makes of it.
      call: for a product in a derivative rule, the sites of the function that it belongs to.

    Raises:
      ValueError: numbers for a product that is not simulated, is quantized, or has other formats for its gradients.
    """
    done = [one for one in call or () if one.treatment is not None]
    sites = [one for one in done if site.has_parameter and one.path == site.path] or done or [site]
    keys = {numbers_key("compute", policy.decided_by("compute", one.names)) for one in sites}
    found = [known.numbers[key] for key in keys if key in known.numbers]
    if not found:
        return None
    if len(keys) > 1 or treatment.execution == "native" or treatment.quantizes or treatment.dgrad or treatment.wgrad:
        raise ValueError(
            f"'{site.name}': numbers= of compute= are for products that are simulated, without quantizers, dgrad= and "
            "wgrad=, and in a custom derivative of one format: leave these out, or give the format itself."
        )
    return found[0]  # pyright: ignore[reportReturnType]
