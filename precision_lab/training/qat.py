"""Training of quantizers that have a state, as data: which policies ask for it, and its schedule. JAX is not imported.

A run whose policy has such a quantizer ("lsq", "lsq+", "pact", "ema") trains what it learns with the parameters, in its
train state, and so in its checkpoints; `nn.prepare_qat` says how.
"""

import functools
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from precision_lab.models.fields import Float, FrozenConfig, NotNegativeInt, located_error
from precision_lab.policy import Policy
from precision_lab.policy.treatment import QUANTIZERS
from precision_lab.quant import Quantizer
from precision_lab.training.start import quantizes_parameters

if TYPE_CHECKING:
    from precision_lab.training.config import RunConfig


class QATConfig(FrozenConfig):
    """When quantizers with a state start and stop.

    Attributes:
      delay: training steps, at first, in which nothing is quantized; ranges are collected already.
      freeze: training steps after which ranges and what is learned stay as they are; None for never.
      momentum: how far an "ema" range moves towards each batch, in (0, 1].
    """

    delay: NotNegativeInt = 0
    freeze: NotNegativeInt | None = None
    momentum: Annotated[Float, Field(gt=0, le=1)] = 0.1


@functools.lru_cache(maxsize=1024)
def has_state(policy: str) -> bool:
    """Returns whether a policy has a quantizer that learns, or follows a running range, anywhere."""
    return any(quantizer.has_state for quantizer in _quantizers(policy))


def weights_have_error(policy: str) -> bool:
    """Returns whether a policy quantizes weights by scales that are a function of them, so that they have an error."""
    return quantizes_parameters(policy) and not has_state(policy)


def learns_offsets(policy: str) -> bool:
    """Returns whether a policy has a quantizer of parameters that learns an offset, anywhere."""
    return any(quantizer.estimator == "lsq+" for quantizer in _quantizers(policy, ("weight", "embedding")))


def _quantizers(policy: str, keys: tuple[str, ...] = QUANTIZERS) -> list[Quantizer]:
    """Returns the quantizers of some settings of a policy, also those of rules."""
    parsed = Policy.parse(policy)
    said = [getattr(parsed, key) for key in keys]
    said += [value for rule in parsed.rules for key, value in rule.settings if key in keys]
    return [quantizer for quantizer in said if quantizer is not None]


def schedule(run: "RunConfig") -> QATConfig | None:
    """Returns the schedule of a run whose policy has quantizers with a state; None for any other."""
    return (run.qat or QATConfig()) if has_state(run.policy) else None


def check_qat(run: "RunConfig") -> None:
    """Raises ValueError, located in the config, for quantizers with a state where a run cannot hold it."""
    if run.qat is not None and not has_state(run.policy):
        message = (
            f"qat is for quantizers with a state (lsq, lsq+, pact, ema), and policy '{run.policy}' has none. Drop qat, "
            "or say what is learned: weight=int4@channel,lsq"
        )
        raise located_error(("qat",), message, run.qat)
    for name, policy in run.evals.items():
        if has_state(policy):
            message = (
                f"policy '{policy}' has quantizers that learn or follow running ranges, which only a run that trains "
                "under it has: make it the policy of an arm, or leave out lsq, lsq+, pact and ema"
            )
            raise located_error(("evals", name), message, policy)
    if not has_state(run.policy):
        return
    if run.lora is not None:
        message = (
            "lora trains adapters beside weights whose quantizers learn nothing: leave out lsq, lsq+, pact and ema"
        )
        raise located_error(("policy",), message, run.policy)
    if (params := Policy.parse(run.policy).params.name) != "float32":
        message = (
            f"quantizers that learn train beside float32 parameters, but the policy stores {params}: store float32, "
            "and say what is multiplied in: compute=bfloat16"
        )
        raise located_error(("policy",), message, run.policy)
