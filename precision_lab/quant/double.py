"""Double quantization: the scales of an array, quantized once more.

Source: Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", 2023, arXiv:2305.14314, section 3. The mean is
  subtracted, and blocks of 256 scales become 8-bit codes of the dynamic data type under a float32 each, as in
  bitsandbytes, functional.py, quantize_4bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from precision_lab.formats import CODEBOOKS, decode_codebook, encode_codebook
from precision_lab.quant.arithmetic import divide, multiply, ordered_sum

_BOOK = CODEBOOKS["dynamic8"]
_BLOCK = 256


@partial(jax.tree_util.register_dataclass, data_fields=["codes", "absmax", "mean"], meta_fields=["shape"])
@dataclass(frozen=True)
class DoubleScales:
    """Scales as they are stored.

    Attributes:
      codes: uint8, one for each scale.
      absmax: float32, one for each 256 of them; NaN if one of these is not finite, and with it all of them.
      mean: float32, one for all.
      shape: shape of the scales.
    """

    codes: Any
    absmax: Any
    mean: Any
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Returns the bytes of codes and float32 numbers."""
        return self.codes.size + 4 * self.absmax.size + 4

    def decode(self) -> jax.Array:
        """Returns the scales as float32; none is negative."""
        levels = decode_codebook(self.codes, _BOOK)
        absmax = jnp.repeat(self.absmax, _BLOCK, total_repeat_length=self.absmax.size * _BLOCK)[: levels.size]
        return jnp.maximum(multiply(levels, absmax) + self.mean, 0).reshape(self.shape)


def encode_scales(scales: jax.Array) -> DoubleScales:
    """Returns float32 scales quantized again."""
    flat = scales.reshape(-1)
    finite = jnp.isfinite(flat)
    count = jnp.maximum(jnp.sum(finite.astype(jnp.float32)), 1)
    mean = divide(ordered_sum(jnp.where(finite, flat, 0), (0,)), count)[0]
    blocks = jnp.pad(flat - mean, (0, -flat.size % _BLOCK)).reshape(-1, _BLOCK)
    absmax = jnp.max(jnp.abs(blocks), axis=1, initial=0)
    absmax = jnp.where(jnp.isfinite(absmax), absmax, np.float32(np.nan))
    codes = encode_codebook(divide(blocks, absmax[:, None]), _BOOK).reshape(-1)[: flat.size]
    return DoubleScales(codes, absmax, mean, scales.shape)
