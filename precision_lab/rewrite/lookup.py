"""Lookups of rows of a parameter, as embeddings are: under a quantizer, or from a table that is stored quantized."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from precision_lab.quant import QTensor
from precision_lab.quant.core import Given
from precision_lab.quant.options import DOUBLE
from precision_lab.rewrite import _compat
from precision_lab.rewrite.held import Numbers, quantized_by, require_state
from precision_lab.rewrite.parameters import Parameter, is_stored
from precision_lab.rewrite.steps import Lookup

LOOKUP = "gather"
_OF_A_ROW = ("channel", "token", "group")  # granularities whose scales belong to one row each


def looks_up_rows(eqn: Any) -> bool:
    """Returns whether a gather takes whole rows of its operand, one for each index, as the last axes of its result."""
    numbers, shape = eqn.params["dimension_numbers"], eqn.invars[0].aval.shape
    if len(shape) < 2 or eqn.params["slice_sizes"] != (1, *shape[1:]) or numbers.operand_batching_dims:
        return False
    last = tuple(range(eqn.invars[1].aval.ndim - 1, eqn.outvars[0].aval.ndim))
    return (numbers.collapsed_slice_dims, numbers.start_index_map, numbers.offset_dims) == ((0,), (0,), last)


def looked_up(eqn: Any, table: Any, indices: jax.Array, step: Lookup) -> jax.Array:
    """Evaluates a lookup in a quantized table; the result has the dtype that it has without.

    Rows are quantized after the lookup where each has its own scales, which is the same and costs less.
    """
    axes = tuple(range(1, table.ndim))
    dtype = eqn.outvars[0].aval.dtype
    if is_stored(table):
        return _from_stored(eqn, table, indices).astype(dtype)
    if isinstance(table, Parameter):
        table.noted(step.site, step.quantizer, axes, "lhs", lambda scales: scales)
        table = table.values()
    require_state(step.site, "table", step.quantizer, step.given)
    qz = step.quantizer
    alone = qz.scale_format != DOUBLE and qz.rounding != "stochastic"  # else a row's values depend on the others
    by_row = qz.granularity.kind in _OF_A_ROW and len(axes) == 1 and alone
    if by_row and isinstance(step.given, (Given, Numbers)) and step.given.scale is None:
        rows = _bind(eqn, table, indices)
        return quantized_by(rows, step.quantizer, (rows.ndim - 1,), step.given).astype(dtype)
    return _bind(eqn, quantized_by(table, step.quantizer, axes, step.given), indices).astype(dtype)


def _from_stored(eqn: Any, table: Parameter, indices: jax.Array) -> jax.Array:
    """Returns rows of a table that is stored, unpacking no others where each is whole bytes."""
    stored = table.value
    if not _has_rows_of_bytes(stored) or table.order != (0, 1):
        return _bind(eqn, table.values(), indices)
    count, width = stored.shape
    wanted = indices[..., 0]
    flat = jnp.clip(wanted.reshape(-1), 0, count - 1)
    packed, scales = stored.packed.reshape(count, -1)[flat].reshape(-1), stored.scales[flat]
    parts = {"packed": packed, "scales": scales, "shape": (flat.size, width), "dtype": np.dtype(np.float32)}
    rows = dataclasses.replace(stored, **parts).dequantize().reshape(*wanted.shape, width)
    if eqn.params["mode"] != jax.lax.GatherScatterMode.FILL_OR_DROP:
        return rows
    beyond = (wanted < 0) | (wanted >= count)
    return jnp.where(beyond[..., None], _fill(eqn), rows)


def _fill(eqn: Any) -> Any:
    """Returns what a gather puts where there is no row."""
    given = eqn.params["fill_value"]
    return jnp.nan if given is None else given


def _has_rows_of_bytes(stored: QTensor) -> bool:
    """Returns whether each row of a stored table is so many bytes and scales of its own, and nothing else."""
    plain = stored.zero_points is None and stored.offsets is None and stored.tensor_scale is None
    if not plain or len(stored.shape) != 2 or stored.quantizer.granularity.kind not in _OF_A_ROW:
        return False
    whole = stored.packed.size % stored.shape[0] == 0 and stored.axis == (1,)
    fmt = stored.quantizer.code_format
    bits = 0 if getattr(fmt, "packed", None) else getattr(fmt, "bits", 0)  # digits of a byte do not keep to rows
    return whole and bits > 0 and stored.shape[1] * bits % 8 == 0 and hasattr(stored.scales, "ndim")


def _bind(eqn: Any, table: jax.Array, indices: jax.Array) -> jax.Array:
    """Evaluates the gather itself, of a table of any dtype."""
    return _compat.bind(eqn, [table, indices])[0]
