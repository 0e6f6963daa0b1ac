"""What rounding costs: our kernels and their peers against one copy of the array (`x * 1.0001`)."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from precision_lab.bench import report
from precision_lab.bench.interleaved import environment, time_interleaved
from precision_lab.bench.report import row
from precision_lab.formats import format, random_bits, round_to, stack_formats
from precision_lab.formats.block_rounding import round_to_blocks
from precision_lab.formats.codebook_rounding import round_to_codebook
from precision_lab.formats.options import ROUNDINGS

# The largest ratio to a copy that we allow ourselves, at a million elements on a CPU.
TARGETS = {
    "round_to e4m3fn": 1.3,
    "round_to e4m3fn, traced": 2.5,
    "round_to e4m3fn, traced, up": 2.5,
    "round_to e4m3fn, traced mode": 2.5,
    "round_to, four formats by vmap": 6.0,
    "random bits, uint8": 4.0,
    "random bits, uint32": 12.0,
    "mxfp8": 3.0,
    "mxfp4": 3.0,
    "mxint8": 3.0,
    "nvfp4": 9.0,
}
PACKAGES = ("jax", "jaxlib", "numpy", "ml_dtypes", "gfloat", "pychop", "torch", "torchao", "qtorch")
UNIT = "copies"

Calls = dict[str, Callable[[], Any]]


def candidates(count: int) -> Calls:
    """Returns everything to be timed on `count` normal float32 numbers, the copy first; peers only where installed."""
    x = np.random.default_rng(0).standard_normal((-(-count // 1024), 1024)).astype(np.float32)
    return {**_ours(jnp.asarray(x)), **_xla(jnp.asarray(x)), **_peers(x)}


def _call(function: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
    """Returns a call of the compiled `function` that ends when its result is there."""
    compiled = jax.jit(function)
    return lambda: jax.block_until_ready(compiled(*arguments))


def _ours(x: jax.Array) -> Calls:
    """Returns the copy and our kernels."""
    key = jax.random.key(0)
    # Operands are on the device, as the array is; a NumPy scalar would be sent there by every call.
    params, stacked = jax.device_put((format("e4m3fn").params(), stack_formats(["e4m3fn", "e5m2", "bf16", "f16"])))
    index = jnp.int32(list(ROUNDINGS).index("nearest_even"))
    bits = random_bits(key, x.shape)
    calls = {
        "copy": _call(lambda x: x * 1.0001, x),
        "round_to e4m3fn": _call(lambda x: round_to(x, "e4m3fn"), x),
        "round_to bfloat16": _call(lambda x: round_to(x, "bfloat16"), x),
        "round_to int8": _call(lambda x: round_to(x, "int8"), x),
        "round_to e4m3fn, up": _call(lambda x: round_to(x, "e4m3fn", rounding="up"), x),
        "round_to e4m3fn, traced": _call(round_to, x, params),
        "round_to e4m3fn, traced, up": _call(lambda x, p: round_to(x, p, rounding="up"), x, params),
        "round_to e4m3fn, traced mode": _call(lambda x, p, i: round_to(x, p, rounding=i), x, params, index),
        "round_to, four formats by vmap": _call(jax.vmap(round_to, in_axes=(None, 0)), x, stacked),
        "round_to e4m3fn, stochastic, bits given": _call(
            lambda x, bits: round_to(x, "e4m3fn", rounding="stochastic", bits=bits), x, bits
        ),
        "round_to e4m3fn, stochastic, key given": _call(
            lambda x, key: round_to(x, "e4m3fn", rounding="stochastic", key=key), x, key
        ),
        "random bits, uint8": _call(lambda key: random_bits(key, x.shape, jnp.uint8), key),
        "random bits, uint32": _call(lambda key: random_bits(key, x.shape), key),
        "nf4": _call(lambda x: round_to_codebook(x, "nf4"), x),
    }
    for name in ("mxfp8", "mxfp4", "mxfp4:rceil", "mxint8", "nvfp4", "nvfp4_2d"):
        calls[name] = _call(lambda x, name=name: round_to_blocks(x, name), x)
    return calls


def _xla(x: jax.Array) -> Calls:
    """Returns what JAX has itself."""
    key = jax.random.key(0)
    calls = {
        "lax.reduce_precision(8, 7)": _call(lambda x: jax.lax.reduce_precision(x, 8, 7), x),
        "jax.random.bits, uint32": _call(lambda key: jax.random.bits(key, x.shape), key),
    }
    for dtype in ("bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "float4_e2m1fn"):
        calls[f"astype {dtype} and back"] = _call(lambda x, d=dtype: x.astype(d).astype(jnp.float32), x)
    return calls


def _peers(x: np.ndarray) -> Calls:
    """Returns the calls of those peers that are installed."""
    # Else PyTorch's idle threads spin for a while after each of its calls, on the cores that others are timed on.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    calls: Calls = {}
    for make in (_gfloat, _pychop, _torchao, _qtorch):
        try:
            calls |= make(x)
        except ImportError:
            continue
    return calls


def _gfloat(x: np.ndarray) -> Calls:
    """Returns gfloat's rounding, on NumPy and compiled by JAX."""
    gfloat, infos = importlib.import_module("gfloat"), importlib.import_module("gfloat.formats")
    info, array = infos.format_info_ocp_e5m2, jnp.asarray(x)
    return {
        "gfloat e5m2, NumPy": lambda: gfloat.round_ndarray(info, x),
        "gfloat e5m2, jit": _call(lambda x: gfloat.round_ndarray(info, x), array),
    }


def _pychop(x: np.ndarray) -> Calls:
    """Returns pychop's rounding on JAX."""
    pychop, array = importlib.import_module("pychop"), jnp.asarray(x)
    pychop.backend("jax")
    chop = pychop.Chop(exp_bits=5, sig_bits=2, rmode=1)
    return {"pychop e5m2, JAX": lambda: jax.block_until_ready(chop(array))}


def _torchao(x: np.ndarray) -> Calls:
    """Returns torchao's MX quantization and dequantization, and torch's float8 round trip."""
    torch = importlib.import_module("torch")
    mx = importlib.import_module("torchao.prototype.mx_formats.mx_tensor")
    tensor = torch.from_numpy(x)

    def mxfp8() -> Any:
        return mx.MXTensor.to_mx(tensor, torch.float8_e4m3fn, 32).dequantize(torch.float32)

    return {"torchao mxfp8": mxfp8, "torch float8_e4m3fn and back": lambda: tensor.to(torch.float8_e4m3fn).float()}


def _qtorch(x: np.ndarray) -> Calls:
    """Returns QPyTorch's rounding."""
    torch, quant = importlib.import_module("torch"), importlib.import_module("qtorch.quant")
    tensor = torch.from_numpy(x)
    return {"qtorch e5m2": lambda: quant.float_quantize(tensor, 5, 2, "nearest")}


def run(*, count: int = 1_000_000, rounds: int = 60, budget_s: float = 1.0) -> dict[str, Any]:
    """Returns the benchmark as JSON types: environment, size, and one row for each candidate."""
    timings = time_interleaved(candidates(count), rounds=rounds, budget_s=budget_s)
    return {
        "benchmark": "formats",
        "command": f"precision-lab bench formats --count {count} --rounds {rounds}",
        "elements": -(-count // 1024) * 1024,
        "rounds": rounds,
        **environment(PACKAGES),
        "rows": [row(timing, TARGETS.get(timing.name)) for timing in timings],
    }


def title(result: dict[str, Any]) -> str:
    """Returns what the table of a result is called."""
    return f"{result['elements']:,} elements on {result['device']}"


def markdown(result: dict[str, Any]) -> str:
    """Returns the benchmark as a Markdown page."""
    lead = f"{result['elements']:,} float32 elements, medians of {result['rounds']} interleaved rounds."
    return report.markdown(result, title="Rounding against one copy of the array", lead=lead, unit=UNIT)
