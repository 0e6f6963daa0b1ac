"""Writes reference.npz: what other implementations of block formats make of the same inputs.

Run it where torch and torchao are installed, which the tests do not need:

    pip install "torch==2.13.*" "torchao==0.18.*" gfloat ml_dtypes
    python tests/formats/make_reference.py

It imports nothing of precision_lab and no JAX. What each array holds is said where it is made.
"""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path

import gfloat
import gfloat.formats
import ml_dtypes
import numpy as np
import torch
from torchao.prototype.mx_formats.config import ScaleCalculationMode
from torchao.prototype.mx_formats.constants import DTYPE_FP6_E2M3, DTYPE_FP6_E3M2
from torchao.prototype.mx_formats.kernels import f4_unpacked_to_f32, unpack_uint4
from torchao.prototype.mx_formats.mx_tensor import to_mx
from torchao.prototype.mx_formats.nvfp4_tensor import nvfp4_quantize

ELEMENTS = {
    "mxfp8_e4m3": torch.float8_e4m3fn,
    "mxfp8_e5m2": torch.float8_e5m2,
    "mxfp6_e3m2": DTYPE_FP6_E3M2,
    "mxfp6_e2m3": DTYPE_FP6_E2M3,
    "mxfp4": torch.float4_e2m1fn_x2,
}
GFLOAT = {
    "mxfp8_e4m3": "mxfp8_e4m3",
    "mxfp8_e5m2": "mxfp8_e5m2",
    "mxfp6_e3m2": "mxfp6_e3m2",
    "mxfp6_e2m3": "mxfp6_e2m3",
    "mxfp4": "mxfp4_e2m1",
    "mxint8": "mxint8",
}
FLOAT32_MAX = np.float32(np.finfo(np.float32).max)


def block_inputs() -> np.ndarray:
    """Returns (128, 32) float32: blocks of many scales and spreads, ties, edges, and zeros.

    The smallest non-zero amax is 2**-100: below 2**-118 torchao keeps to scales of at least 2**-126.
    """
    rng = np.random.default_rng(2024)
    scales = np.exp2(rng.integers(-90, 110, (128, 1))).astype(np.float32)
    x = (rng.standard_normal((128, 32)) * np.exp(rng.standard_normal((128, 32)))).astype(np.float32) * scales
    # Every other block has few mantissa bits, so that ties between elements are common.
    words = x.view(np.uint32)
    words[::2] &= np.uint32(0xFFF80000)
    x[1, 0] = 127.99999  # the largest float below 128; a float32 log2 takes it for 128
    x[1, 1:] = np.linspace(-120, 120, 31)
    x[3] = np.linspace(-1000, 957, 32)
    x[5] = 0
    x[6] = -0.0
    x[7, 1:] = 0
    x[9] = np.float32(2.0**-100) * np.arange(-16, 16)
    x[11] = np.float32(2.0**120) * np.linspace(-1, 1, 32)
    x[13] = np.linspace(-1.9999999, 1.9999999, 32)
    return x


def torchao_mx(x: np.ndarray) -> dict[str, np.ndarray]:
    """Returns E8M0 codes and element codes by torchao's `to_mx`, for every element and scale rule."""
    out = {}
    for name, dtype in ELEMENTS.items():
        for mode in ("floor", "ceil", "even", "rceil"):
            scales, data = to_mx(torch.from_numpy(x.copy()), dtype, 32, ScaleCalculationMode[mode.upper()])
            codes = unpack_uint4(data.view(torch.uint8)) if name == "mxfp4" else data.view(torch.uint8)
            out[f"torchao/{name}/{mode}/scales"] = scales.view(torch.uint8).numpy()
            out[f"torchao/{name}/{mode}/codes"] = codes.reshape(x.shape).numpy()
    return out


def gfloat_mx(x: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the values of every MX format by gfloat's `quantize_block`, under the floor rule."""
    out = {}
    for name, theirs in GFLOAT.items():
        info = getattr(gfloat.formats, f"format_info_{theirs}")
        rows = [gfloat.quantize_block(info, row.astype(np.float64), gfloat.compute_scale_amax) for row in x]
        out[f"gfloat/{name}"] = np.array(rows).astype(np.float32)
    return out


def nvfp4_inputs() -> np.ndarray:
    """Returns (64, 64) float32 with blocks of very different scales, and one of zeros."""
    rng = np.random.default_rng(7)
    x = rng.standard_normal((64, 64)) * np.exp2(rng.integers(-6, 3, (64, 4))).repeat(16, 1)
    x[5, 16:32] = 0
    x[:16, 48:] *= 1e-4
    return x.astype(np.float32)


def transformer_engine_nvfp4(x: np.ndarray, tile: tuple[int, int]) -> dict[str, np.ndarray]:
    """Returns element codes, scale codes, the array's decode scale and the values, by TransformerEngine's algorithm.

    The steps of its reference quantizer in its order, every operation rounded to float32.
    """
    rows, columns = tile
    blocks = x.reshape(x.shape[0] // rows, rows, x.shape[1] // columns, columns)
    amax = np.abs(blocks).max((1, 3), keepdims=True)
    encode = np.minimum(np.float32(448 * 6) / np.abs(x).max(), FLOAT32_MAX)
    decode = np.float32(1) / encode
    wanted = amax * (encode * (np.float32(1) / np.float32(6)))
    scales = np.clip(np.minimum(wanted, FLOAT32_MAX), np.float32(-448), np.float32(448)).astype(ml_dtypes.float8_e4m3fn)
    with np.errstate(divide="ignore"):
        factor = np.minimum(np.float32(1) / (scales.astype(np.float32) * decode), FLOAT32_MAX)
    scaled = np.clip(blocks * factor, np.float32(-6), np.float32(6)).astype(ml_dtypes.float4_e2m1fn)
    values = scaled.astype(np.float32) * scales.astype(np.float32) * decode
    return {
        "codes": scaled.view(np.uint8).reshape(x.shape) & 15,
        "scales": scales.view(np.uint8).reshape(amax.shape[0], amax.shape[2]),
        "tensor_scale": decode,
        "values": values.reshape(x.shape),
    }


def torchao_nvfp4(x: np.ndarray) -> np.ndarray:
    """Returns the values of torchao's two-level NVFP4."""
    tensor_scale = np.float32(np.abs(x).max()) / np.float32(448 * 6)
    scales, packed = nvfp4_quantize(torch.from_numpy(x.copy()), 16, torch.tensor(tensor_scale))
    elements = f4_unpacked_to_f32(unpack_uint4(packed)).reshape(x.shape[0], -1, 16)
    values = elements * scales.to(torch.float32).reshape(x.shape[0], -1, 1) * tensor_scale
    return values.reshape(x.shape).numpy()


def main() -> None:
    """Writes reference.npz beside this file."""
    mx, nv = block_inputs(), nvfp4_inputs()
    arrays = {"mx_inputs": mx, "nvfp4_inputs": nv, **torchao_mx(mx), **gfloat_mx(mx)}
    for name, tile in (("nvfp4", (1, 16)), ("nvfp4_2d", (16, 16))):
        arrays |= {f"te/{name}/{key}": value for key, value in transformer_engine_nvfp4(nv, tile).items()}
    arrays["torchao/nvfp4"] = torchao_nvfp4(nv)
    versions = {name: version(name) for name in ("torch", "torchao", "gfloat", "ml_dtypes", "numpy")}
    arrays["versions"] = np.array(json.dumps(versions))
    path = Path(__file__).with_name("reference.npz")
    np.savez_compressed(path, **arrays)
    print(f"{path.name}: {len(arrays)} arrays, {path.stat().st_size} bytes, {versions}")


if __name__ == "__main__":
    main()
