"""Packing: codes of 1 to 8 bits as bytes without gaps, and trits by fives.

Bits are filled from the lowest of each byte, a code's lowest bit first, as most file formats and kernels do: two
4-bit codes are low nibble, high nibble; eight 3-bit codes are three bytes. Ragged sizes cost at most one partly
filled byte. The same code runs on NumPy and, traced, on JAX arrays.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np


def packed_bytes(count: int, bits: int, *, per_byte: int | None = None) -> int:
    """Returns the bytes that `count` codes take: of `bits` bits each, or `per_byte` of them to a byte."""
    return -(-count // per_byte) if per_byte else -(-count * bits // 8)


def pack(codes: Any, bits: int) -> Any:
    """Returns `codes`, flattened in row-major order, packed into bytes.

    Args:
      codes: unsigned integers below 2**bits, NumPy or JAX, any shape; higher bits are dropped.
      bits: bits of a code, 1 to 16.

    Returns:
      uint8 array of `packed_bytes(codes.size, bits)` elements; the unused bits of the last byte are zero.

    Raises:
      TypeError: `codes` are no unsigned integers.
      ValueError: `bits` is out of range.
    """
    xp, _check = _namespace(codes), _check_codes(codes, bits)
    groups, group_bytes = _groups(bits)
    flat = codes.reshape(-1).astype(np.uint32) & np.uint32((1 << bits) - 1)
    flat = xp.pad(flat, (0, -flat.size % groups)).reshape(-1, groups)
    columns = []
    for byte in range(group_bytes):
        column = xp.zeros(flat.shape[0], np.uint32)
        for place in range(groups):
            shift = place * bits - byte * 8
            if -bits < shift < 8:
                part = flat[:, place]
                column = column | (part << np.uint32(shift) if shift >= 0 else part >> np.uint32(-shift))
        columns.append(column & np.uint32(255))
    packed = xp.stack(columns, 1).reshape(-1).astype(np.uint8)
    return packed[: packed_bytes(codes.size, bits)]


def unpack(packed: Any, bits: int, shape: tuple[int, ...]) -> Any:
    """Returns the codes that `pack` put into bytes, in their shape, as uint8 (uint16 for more than 8 bits).

    Raises:
      TypeError: `packed` is not uint8.
      ValueError: `packed` has not the bytes that so many codes take.
    """
    xp, count = _namespace(packed), math.prod(shape)
    _check_packed(packed, packed_bytes(count, bits), f"{count} codes of {bits} bits")
    if bits == 8:
        return packed.reshape(shape)
    if 8 % bits == 0:
        places = np.arange(0, 8, bits, dtype=np.uint8)
        codes = (packed[:, None] >> places) & np.uint8((1 << bits) - 1)
        return codes.reshape(-1)[:count].reshape(shape)
    groups, group_bytes = _groups(bits)
    rows = xp.pad(packed, (0, -packed.size % group_bytes)).reshape(-1, group_bytes).astype(np.uint32)
    columns = []
    for place in range(groups):
        column = xp.zeros(rows.shape[0], np.uint32)
        for byte in range(group_bytes):
            shift = place * bits - byte * 8
            if -bits < shift < 8:
                part = rows[:, byte]
                column = column | (part >> np.uint32(shift) if shift >= 0 else part << np.uint32(-shift))
        columns.append(column & np.uint32((1 << bits) - 1))
    codes = xp.stack(columns, 1).reshape(-1)[:count].reshape(shape)
    return codes.astype(np.uint8 if bits <= 8 else np.uint16)


def pack_digits(codes: Any, base: int, per_byte: int) -> Any:
    """Returns codes below `base`, `per_byte` to a byte as digits of a number, the first the lowest.

    Ternary codes go five to a byte (3**5 = 243), 1.6 bits each.

    Args:
      codes: unsigned integers below `base`, NumPy or JAX, any shape.
      base: number of different codes.
      per_byte: digits in a byte.

    Raises:
      TypeError: `codes` are no unsigned integers.
      ValueError: so many digits do not fit a byte.
    """
    xp, _check = _namespace(codes), _check_codes(codes, 8)
    if base < 2 or base**per_byte > 256:
        raise ValueError(f"{per_byte} digits of base {base} do not fit a byte.")
    flat = codes.reshape(-1).astype(np.uint32)
    digits = xp.pad(flat, (0, -flat.size % per_byte)).reshape(-1, per_byte)
    weights = np.array([base**place for place in range(per_byte)], np.uint32)
    return (digits * weights).sum(1).astype(np.uint8)


def unpack_digits(packed: Any, base: int, per_byte: int, shape: tuple[int, ...]) -> Any:
    """Returns the codes that `pack_digits` put into bytes, as uint8; errors as for `unpack`."""
    xp, count = _namespace(packed), math.prod(shape)
    _check_packed(packed, packed_bytes(count, 8, per_byte=per_byte), f"{count} digits, {per_byte} to a byte")
    rest, digits = packed.astype(np.uint32), []
    for _ in range(per_byte):
        digits.append(rest % np.uint32(base))
        rest = rest // np.uint32(base)
    return xp.stack(digits, 1).reshape(-1)[:count].reshape(shape).astype(np.uint8)


def pack_codes(codes: Any, fmt: Any) -> Any:
    """Returns codes of a format or codebook packed as its `storage_bits` say."""
    per_byte = getattr(fmt, "packed", None)
    return pack_digits(codes, len(fmt.levels), per_byte) if per_byte else pack(codes, fmt.bits)


def unpack_codes(packed: Any, fmt: Any, shape: tuple[int, ...]) -> Any:
    """Returns the inverse of `pack_codes`."""
    per_byte = getattr(fmt, "packed", None)
    return unpack_digits(packed, len(fmt.levels), per_byte, shape) if per_byte else unpack(packed, fmt.bits, shape)


def _groups(bits: int) -> tuple[int, int]:
    """Returns (codes, bytes) of the smallest number of codes that fills whole bytes."""
    whole = math.lcm(bits, 8)
    return whole // bits, whole // 8


def _namespace(array: Any) -> Any:
    """Returns the module of array functions for `array`: numpy for its own arrays, else jax.numpy."""
    if isinstance(array, np.ndarray):
        return np
    import jax.numpy as jnp

    return jnp


def _check_codes(codes: Any, bits: int) -> None:
    """Refuses what cannot be packed."""
    if not 1 <= bits <= 16:
        raise ValueError(f"codes of 1 to 16 bits can be packed, got bits={bits}.")
    if np.dtype(codes.dtype).kind != "u":
        raise TypeError(f"codes are unsigned integers, got {codes.dtype} {codes.shape}.")


def _check_packed(packed: Any, expected: int, what: str) -> None:
    """Refuses bytes that are not those of so many codes."""
    if packed.dtype != np.uint8:
        raise TypeError(f"packed codes are uint8, got {packed.dtype} {packed.shape}.")
    if packed.ndim != 1 or packed.size != expected:
        raise ValueError(f"{what} take {expected} bytes in one axis, got an array of shape {packed.shape}.")
