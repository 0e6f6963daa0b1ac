"""Held states: what the quantizer of one operand knows from outside, applied where the operand is quantized.

The state after a step leaves through a mark on the quantized value, which a harvest reads. In a scan over layers, one
that slices parameters, every layer has a state of its own, and a scan slices them too; in any other scan all
iterations share one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from precision_lab.formats import FormatParams
from precision_lab.policy import Treatment
from precision_lab.quant import (
    Quantizer,
    QuantizerParams,
    QuantizerState,
    init_state,
    needs_state,
    quantize_with_state,
)
from precision_lab.quant.core import Given
from precision_lab.rewrite.marks import OPERANDS, carry
from precision_lab.rewrite.quantized import NOTHING_GIVEN, SHARED, fake_quantized, key_for
from precision_lab.rewrite.sites import Site

_META = ["train", "delay", "freeze", "momentum", "site", "role", "scans"]


@partial(jax.tree_util.register_dataclass, data_fields=["state"], meta_fields=_META)
@dataclasses.dataclass(frozen=True)
class Held:
    """The state of one quantizer and how it is used.

    Attributes:
      state: the state, with leading axes for scans over layers; None where one is to be made: then the operand passes
        as it is, and the state that would start from it is carried out.
      train, delay, freeze, momentum: as for `quantize_with_state`.
      site, role: where it is.
      scans: of each scan around the site, outermost first, whether it is one over layers.
    """

    state: QuantizerState | None = None
    train: bool = True
    delay: int = 0
    freeze: int | None = None
    momentum: float = 0.1
    site: str = ""
    role: str = ""
    scans: tuple[bool, ...] = ()

    def quantized(self, x: jax.Array, quantizer: Quantizer, axes: tuple[int, ...]) -> jax.Array:
        """Returns an operand on the grid of its quantizer, in float32; see `fake_quantized`."""
        x = x.astype(jnp.float32)
        if self.state is None:
            return self._carrying(x, quantizer, init_state(quantizer, x, axis=axes, freeze=self.freeze))
        options = {"train": self.train, "delay": self.delay, "momentum": self.momentum, "key": key_for(x, quantizer)}
        freeze = self.freeze if needs_state(quantizer) else None  # a delay holds back dynamic ones too
        value, after = quantize_with_state(x, quantizer, self.state, axis=axes, freeze=freeze, **options)
        return self._carrying(value, quantizer, QuantizerState({}, after.running)) if self.train else value

    def _carrying(self, value: jax.Array, quantizer: Quantizer, state: QuantizerState) -> jax.Array:
        """Returns a value whose mark carries a state."""
        leaves, structure = jax.tree.flatten(jax.lax.stop_gradient(state))
        return carry(value, StateMark(self.site, self.role, quantizer, self.scans, structure), leaves)


class StateMark(NamedTuple):
    """What a mark that carries a state is: see `Held`; `structure` is that of the state."""

    site: str
    role: str
    quantizer: Quantizer
    scans: tuple[bool, ...]
    structure: Any
    is_cotangent: bool = False
    is_tangent: bool = False


class AsCodes(NamedTuple):
    """Numbers of a quantizer whose codes fit the array type of the codes of the policy's own, and may be multiplied."""

    params: QuantizerParams


class Numbers(NamedTuple):
    """The numbers of a quantizer, which may be traced, in place of its own; see `fake_quantize`.

    Attributes:
      params: the numbers.
      given: what the quantizer is not to find itself.
      as_codes: whether codes may be multiplied, see `AsCodes`; else values are.
    """

    params: QuantizerParams
    given: Given
    as_codes: bool = False

    @property
    def scale(self) -> Any:
        """What the quantizer is not to find itself."""
        return self.given.scale


class Known(NamedTuple):
    """What is given to quantizers: by site and operand, and numbers by setting; see `numbers_key`.

    Numbers of "compute" are those of a format.
    """

    sites: Mapping[str, Mapping[str, Any]]
    numbers: Mapping[str, QuantizerParams | AsCodes | FormatParams]


def numbers_key(setting: str, pattern: str) -> str:
    """Returns the key of the numbers of a quantizer that a rule gives, or of the policy's own for an empty pattern."""
    return f"{pattern}:{setting}" if pattern else setting


def quantized_by(x: jax.Array, quantizer: Quantizer, axes: tuple[int, ...], given: Given | Held | Numbers) -> jax.Array:
    """Returns an operand on the grid of its quantizer, in float32, under what is known of it from outside."""
    if isinstance(given, Held):
        return given.quantized(x, quantizer, axes)
    if isinstance(given, Numbers):
        return fake_quantized(x, quantizer, axes, given.given, given.params)
    return fake_quantized(x, quantizer, axes, given)


def axes_before(layout: Any, quantizer: Any, axes: tuple[int, ...], given: Any) -> tuple[int, ...] | None:
    """Returns along which axes to quantize an operand before it is brought into the shape of its product, if it can be.

    Where that is the same it is faster: XLA does not fuse what made an operand with what follows a reshape.
    """
    known = given.given if isinstance(given, Numbers) else given
    can = isinstance(known, Given) and all(np.ndim(each) == 0 for each in known if each is not None)
    return layout.merged_into(axes) if can and quantizer.granularity.kind in SHARED else None


def takes_codes(given: Any) -> bool:
    """Returns whether a quantizer under what is given can have its codes multiplied: those of its own numbers."""
    return given.as_codes if isinstance(given, Numbers) else not isinstance(given, Held)


def at_site(
    known: Known,
    site: Site,
    role: str,
    treatment: Treatment,
    scans: tuple[bool, ...],
    pattern_of: Callable[[str], str] = lambda setting: "",
) -> Any:
    """Returns what is given for one operand; a held state knows where it is.

    Args:
      known: everything that is given.
      site, role: the operand.
      treatment: what the policy says at the site.
      scans: see `Held`.
      pattern_of: from a setting to the pattern of the rule that decides it at the site, empty if none does.

    Raises:
      ValueError: numbers for a quantizer that is not simulated before its product, or has a state.
    """
    found = known.sites.get(site.name, {}).get(role, NOTHING_GIVEN)
    setting = dict(zip(OPERANDS, site.quantized_by, strict=False)).get(role, "")
    key = numbers_key(setting, pattern_of(setting))
    if key in known.numbers and getattr(treatment, setting) is not None:
        again = treatment.gradient is not None or treatment.backward in ("original", "requantized")
        if isinstance(found, Held) or treatment.execution == "native" or (again and site.is_product):
            raise ValueError(
                f"'{site.name}': numbers= are for quantizers that are simulated before their product, without a state: "
                "leave out execution=native, gradient=, backward= and 'lsq' or 'ema'."
            )
        numbers = known.numbers[key]
        assert not isinstance(numbers, FormatParams)
        as_codes = isinstance(numbers, AsCodes)
        return Numbers(numbers.params if isinstance(numbers, AsCodes) else numbers, found, as_codes)
    return dataclasses.replace(found, site=site.name, role=role, scans=scans) if isinstance(found, Held) else found


def require_state(site: str, role: str, quantizer: Quantizer | None, given: Any) -> None:
    """Raises ValueError for a quantizer that asks for a state where it has none."""
    if quantizer is None or isinstance(given, Held) or given.scale is not None or not needs_state(quantizer):
        return
    what = "a running range" if quantizer.calibration == "ema" else "a learned scale"
    raise ValueError(
        f"'{site}' quantizes its {role} by {str(quantizer)!r}, which has {what}, but no state that could hold it: "
        "say pl.prepare_qat(model, policy, example) for a model of NNX, pl.prepare_qat(module, policy) for one of "
        "Linen, or pl.QAT(policy) for a function, in place of apply_policy. Without training, leave out "
        f"{'ema' if quantizer.calibration == 'ema' else quantizer.estimator}."
    )
