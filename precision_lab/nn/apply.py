"""`apply_policy` and `sites` for plain functions, NNX models and Linen models alike."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, TypeVar

from flax import linen, nnx

from precision_lab.formats import FormatParams
from precision_lab.nn.linen_policy import linen_sites, linen_under_policy
from precision_lab.nn.nnx_policy import nnx_sites, nnx_under_policy, set_numbers
from precision_lab.nn.numbers import require_keys
from precision_lab.nn.own import own_policy
from precision_lab.nn.pure import require_function
from precision_lab.policy import Policy
from precision_lab.quant import QuantizerParams
from precision_lab.rewrite import SiteTable, apply_to_function, sites_of_function

Target = TypeVar("Target")


def apply_policy(
    target: Target, policy: Any, *, numbers: Mapping[str, QuantizerParams | FormatParams] | None = None
) -> Target:
    """Returns `target` under `policy`; its code is not touched and need not know.

    Products (dot_general and conv_general_dilated) run in the policy's compute format with its accumulator, in the
    forward pass and in both backward products; everything else runs as written. A weight is cast where it is
    used, so its gradient accumulates in its own dtype. Floating outputs are cast to the policy's output dtype.
    Differentiate what is returned, as in `grad(apply_policy(f, policy))`: of a function that differentiates inside, as
    `apply_policy(grad(f), policy)`, the backward products are products like all others, and `gradient` is not for them.

    Args:
      target: an `nnx.Module` instance, a `linen.Module` instance, or a function `fn(params, *args, **kwargs)`.
      policy: a Policy, its string, a preset's name, or a jmp.Policy.
      numbers: for a function or an NNX model: by setting ("weight", "activation", "attention", "embedding"), what its
        quantizers take in place of their own numbers, as of `quant.quantizer_params` or, for vmap,
        `quant.stack_quantizers`; for "compute" what products take in place of their format, as of `Format.params` or
        `stack_formats`. Where a rule decides the setting, it is `pattern:setting`. They may be traced, so that a sweep
        over bit widths or formats is one program. These products are simulated; weights that are stored quantized stay
        as they are. An NNX model keeps them in a variable; `nn.numbers.apart` takes them out of a policy.

    Returns:
      The same kind of thing:
      a copy of the NNX model, of a subclass of its class, with the same variables under the same paths, its `Param`s
      stored in the policy's params dtype;
      a Linen module of a subclass of its class, whose `init` stores params in the policy's dtype and whose `apply`
      follows the policy;
      a function of the same signature.

    Raises:
      TypeError: `target` is none of these, or numbers are given for a Linen model.
      ValueError: the policy cannot be parsed, or numbers are for no setting; on a call, numbers for what is not
        simulated or of "compute" for products that are quantized, a rule that matches no site,
        or a quantizer with a state ("lsq", "ema"), which `prepare_qat` and `QAT` hold.

    The policy acts on calls from outside: `model(...)` and every other public method in NNX (`model.encode(x)`),
    `apply` with any `method=` in Linen, where `bind` and `flax.linen.apply` are refused. Rules must each match a site
    of the model's `__call__`. Models under a policy can be copied and pickled, if their classes can.
    """
    policy = Policy.parse(policy)
    if numbers is not None:
        return _with_numbers(target, policy, numbers)
    if isinstance(target, nnx.Module):
        return nnx_under_policy(target, policy)
    if isinstance(target, linen.Module):
        return linen_under_policy(target, policy)
    require_function(target)
    return apply_to_function(target, policy)  # pyright: ignore[reportReturnType, reportArgumentType]


def _with_numbers(target: Any, policy: Policy, numbers: Mapping[str, QuantizerParams | FormatParams]) -> Any:
    """Returns a function or an NNX model under a policy whose quantizers have other numbers."""
    if isinstance(target, linen.Module):
        raise TypeError(f"numbers= are for functions and NNX models; make a function of {type(target).__name__}.apply.")
    require_keys(policy, numbers)
    if isinstance(target, nnx.Module):
        model = nnx_under_policy(target, policy)
        set_numbers(model, numbers)
        return model
    require_function(target)
    return apply_to_function(target, policy, numbers)


def sites(target: Any, *args: Any, policy: Any = None, **kwargs: Any) -> SiteTable:
    """Returns the sites of `target` under `policy`: what each product is called and what the policy makes of it.

    Nothing is executed; arrays may be `jax.ShapeDtypeStruct`s.

    Args:
      target: NNX model, Linen model or function, as in `apply_policy`.
      args, kwargs: what it is called with; for a Linen model the arguments of `apply`, variables first; for a
        function its params first.
      policy: a Policy or what parses to one; by default that of a model which is under one, else "float32".

    Raises:
      TypeError: `target` is none of these, or the params of a function are missing.
      ValueError: a rule matches no site.
    """
    return _sites(target, policy, args, kwargs, everything=False)


def explain(target: Any, *args: Any, policy: Any = None, **kwargs: Any) -> SiteTable:
    """Returns what `policy` makes of every operation on floating arrays in `target`, products or not.

    A dry run: nothing is executed. `op` in the settings is the category of the op table; an operation that is not in
    it is listed with the reason why it runs as its author wrote it. Arguments and errors are those of `sites`.
    """
    return _sites(target, policy, args, kwargs, everything=True)


def _sites(target: Any, policy: Any, args: Any, kwargs: Any, *, everything: bool) -> SiteTable:
    """Returns the sites of a model or function."""
    is_model = isinstance(target, nnx.Module | linen.Module)
    own = own_policy(target) if is_model and policy is None else policy
    policy = Policy.parse("float32" if own is None else own)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the table says itself what was not reached
        if isinstance(target, nnx.Module):
            return nnx_sites(target, policy, args, kwargs, everything=everything)
        if isinstance(target, linen.Module):
            return linen_sites(target, policy, args, kwargs, everything=everything)
        require_function(target)
        if not args:
            raise TypeError("the sites of a function are those of a call fn(params, ...); give its params first.")
        return sites_of_function(target, policy, args[0], args[1:], kwargs, everything=everything)
