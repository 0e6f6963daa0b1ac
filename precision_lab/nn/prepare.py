"""`prepare_qat`: a model with quantizers that learn, or follow running ranges, as a policy says."""

from __future__ import annotations

from typing import Any

from flax import linen, nnx

from precision_lab.nn.linen_policy import linen_under_policy
from precision_lab.nn.nnx_policy import nnx_under_qat
from precision_lab.nn.qat import QAT


def prepare_qat(
    target: Any,
    policy: Any,
    *args: Any,
    delay: int = 0,
    freeze: int | None = None,
    momentum: float = 0.1,
    **kwargs: Any,
) -> Any:
    """Returns `target` under a policy whose quantizers have a state, for quantization-aware training.

    As `apply_policy`, and what quantizers learn trains with the parameters, what they observe moves as the statistics
    of a batch norm do. A scan over layers has quantizers for each layer; see `QAT`.

    NNX: a copy, whose learned numbers are `QuantParam`s, which `nnx.Optimizer(model, tx, wrt=nnx.Param)` trains, and
    whose running ones are `QuantStat`s, in `model.quantizer_states.sites[site][operand]`. `model.train()` and
    `model.eval()` say whether a call is a step of training, which it is at first.

    Linen: a module whose `init`, which needs a real batch, adds them under the key "quantizer_states": learned numbers
    to "params", running ones to the collection "quant_stats". An `apply` with "quant_stats" among its `mutable`
    collections is a step of training, any other is evaluation.

    Args:
      target: an `nnx.Module` or `linen.Module`; a function is for `QAT`.
      policy: a Policy or what parses to one, such as "weight=int4@channel,lsq,activation=int8@tensor,ema".
      args, kwargs: for NNX, what the model is called with: real data, which learned numbers start from. Nothing for
        Linen.
      delay, freeze, momentum: as of `QAT`.

    Raises:
      TypeError: `target` is neither, or data are missing, or given for Linen.
      ValueError: as `apply_policy` and `QAT`.
    """
    qat = QAT(policy, delay, freeze, momentum)
    if isinstance(target, nnx.Module):
        if not (args or kwargs):
            raise TypeError("prepare_qat needs data to start from: pl.prepare_qat(model, policy, x).")
        return nnx_under_qat(target, qat, args, kwargs)
    if isinstance(target, linen.Module):
        if args or kwargs:
            raise TypeError("prepare_qat of a Linen module takes no data: what is learned starts in its init.")
        return linen_under_policy(target, qat.policy, qat)
    raise TypeError(
        f"prepare_qat takes an nnx.Module or linen.Module, got {type(target).__name__}; for a function of its "
        "parameters there is pl.QAT(policy), whose state is a pytree."
    )
