"""What no product can do: settings that contradict each other, told with where each comes from and the way out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from precision_lab.policy.treatment import (
    FLOAT64,
    OF_PRODUCTS,
    SETTINGS,
    Treatment,
    default_accum,
    require_sign_and_zero,
)


class SaysSettings(Protocol):
    """A rule, see `precision_lab.policy.policy.Rule`."""

    @property
    def pattern(self) -> str: ...

    def sets(self, *keys: str) -> bool: ...


class Origins(NamedTuple):
    """Where the settings of a treatment come from.

    Attributes:
      rules: the rules that made it of a policy's own settings, in order; a later one overrides earlier ones.
      site: name of the operation, empty for none in particular.
    """

    rules: Sequence[SaysSettings] = ()
    site: str = ""

    def said(self, treatment: Treatment, key: str) -> str:
        """Returns a setting with what says it, as "gradient=int8 in rule '**/head/**'"."""
        rule = self._rule_of(key)
        return f"{key}={SETTINGS[key].show(getattr(treatment, key))}" + (f" in rule '{rule.pattern}'" if rule else "")

    def way_out(self, *keys: str, missing: str = "") -> str:
        """Returns what to do about settings that contradict each other, `missing` for want of a value."""
        last = next((rule for rule in reversed(self.rules) if rule.sets(*keys)), None)
        kept = [key for key in keys if last is not None and self._rule_of(key) is not last]
        if last is None or not kept:
            return "leave one of them out"
        off = "" if kept[0] == missing else " (none switches it off)"
        return f"say {kept[0]}= in rule '{last.pattern}' too{off}"

    def _rule_of(self, key: str) -> SaysSettings | None:
        """Returns the rule that decides a setting, None for the policy's own."""
        return next((rule for rule in reversed(self.rules) if rule.sets(key)), None)

    def error(self, message: str) -> ValueError:
        """Returns what to raise."""
        return ValueError(f"'{self.site}': {message}" if self.site else message)


NOWHERE = Origins()


def check_treatment(treatment: Treatment, origins: Origins = NOWHERE) -> None:
    """Raises ValueError for what no product can do."""
    if treatment.compute.kind != "float":
        compute = treatment.compute.name
        by = ("", "") if treatment.compute.kind == "block" else ("@channel", "@token")
        raise origins.error(
            f"{origins.said(treatment, 'compute')} is not a floating format; a cast has no scale to give it. Quantize "
            f"instead: weight={compute}{by[0]},activation={compute}{by[1]}."
        )
    for key in ("compute", "dgrad", "wgrad", "round"):
        if getattr(treatment, key) is not None:
            require_sign_and_zero(f"{key}", getattr(treatment, key))
    if treatment.accum != default_accum(treatment.compute):
        _check_simulated_accumulator(treatment, origins)
    if treatment.backward == "requantized" and treatment.dgrad is not None and treatment.wgrad is not None:
        backward = origins.said(treatment, "backward")
        raise origins.error(
            f"{backward} has nothing to quantize: dgrad and wgrad are both given; leave one of the three out."
        )
    if treatment.outliers is not None:
        _check_outliers(treatment, origins)
    _check_estimators(treatment, origins)
    if treatment.gradient is not None and treatment.backward in ("quantized", "original"):
        backward, way_out = origins.said(treatment, "backward"), origins.way_out("gradient", "backward")
        raise origins.error(
            f"{origins.said(treatment, 'gradient')} quantizes all three products anew: backward can only be "
            f"requantized, but there is {backward}; {way_out}."
        )


def check_whole(treatment: Treatment) -> None:
    """Raises ValueError for a policy that says how something is done which it does not do.

    Of one rule that is not known before it meets others: then a setting without effect is refused at its sites.
    """
    if treatment.backward is not None and not treatment.quantizes:
        raise ValueError(f"backward={treatment.backward} needs weight=, activation= or gradient=.")
    if treatment.outliers is not None:
        _check_both(treatment, NOWHERE)


def check_at(treatment: Treatment, origins: Origins) -> None:
    """Raises ValueError for what the product of a site cannot do when all its rules have had their say."""
    check_treatment(treatment, origins)
    if treatment.outliers is not None and (treatment.weight is None) != (treatment.activation is None):
        _check_both(treatment, origins)


def _check_both(treatment: Treatment, origins: Origins) -> None:
    """Raises unless weights and activations are quantized, from which outliers could be excepted."""
    missing = next((key for key in ("weight", "activation") if getattr(treatment, key) is None), None)
    if missing:
        raise origins.error(
            f"{origins.said(treatment, 'outliers')} excepts features from weight= and activation=, which are not both "
            f"given, but {origins.said(treatment, missing)}; "
            f"{origins.way_out(missing, 'outliers', missing=missing)}."
        )


def _check_outliers(treatment: Treatment, origins: Origins) -> None:
    """Raises unless outliers can be taken apart from what is quantized."""
    what = origins.said(treatment, "outliers")
    if treatment.execution == "native":
        execution = origins.said(treatment, "execution")
        raise origins.error(f"{what} is simulated, but {execution}; leave one of them out.")
    for key in ("gradient", "backward"):
        if getattr(treatment, key) not in (None, "quantized"):
            raise origins.error(
                f"{what} takes operands apart before the product: backward can only be quantized, but there is "
                f"{origins.said(treatment, key)}; {origins.way_out('outliers', key)}."
            )


def _check_estimators(treatment: Treatment, origins: Origins) -> None:
    """Raises where a quantizer has a gradient estimator that the backward products would pass over."""
    by = next((key for key in ("backward", "gradient") if getattr(treatment, key) not in (None, "quantized")), "")
    for key in OF_PRODUCTS if by else ():
        quantizer = getattr(treatment, key)
        if quantizer is not None and quantizer.estimator != "ste":
            estimator, said = quantizer.estimator, origins.said(treatment, key)
            what = said if key == by else f"{said}: {origins.said(treatment, by)}"
            way_out = f"leave out '{estimator}'" if key == by else origins.way_out(key, by)
            raise origins.error(
                f"{what} goes straight through a quantizer, so that its estimator '{estimator}' would have no effect; "
                f"{way_out}."
            )


def _check_simulated_accumulator(treatment: Treatment, origins: Origins) -> None:
    """Raises unless the accumulator, which is not the native one, can be simulated in float32."""
    compute, accum = treatment.compute, origins.said(treatment, "accum")
    if FLOAT64 in (compute, treatment.accum.format):
        raise origins.error(
            f"{accum} is not available with compute={compute.name}: these products accumulate in "
            f"{default_accum(compute)}; leave accum= out."
        )
    if treatment.execution == "native":
        raise origins.error(
            f"{accum} is simulated, but {origins.said(treatment, 'execution')}: no hardware lets us choose an "
            "accumulator; leave one of them out."
        )
