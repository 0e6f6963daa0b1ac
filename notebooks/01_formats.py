# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Number formats as pictures
#
# A format is a finite set of numbers. Where they lie decides what happens to a tensor that is stored in it: how large
# it may become, how small, and how far each value moves. Three pictures show that: the values themselves, the
# relative error against magnitude, and the range of exponents.

# %%
import matplotlib.pyplot as plt
import numpy as np

import precision_lab as pl
from precision_lab.formats.block_rounding import encode_blocks, round_to_blocks
from precision_lab.formats.blocks import block_format
from precision_lab.formats.codebooks import CODEBOOKS
from precision_lab.formats.pictures import exponent_window

# %% [markdown]
# ## Number lines
#
# Floats double their spacing at every power of two, integers never do, and NF4 follows the normal distribution. All
# are drawn over their largest value. Each has 16 codes, of which floats spend two on zero.

# %%
lines = {name: pl.format(name).grid() / pl.format(name).max for name in ("int4", "float4_e2m1fn", "e3m0:finite")}
lines["nf4"] = CODEBOOKS["nf4"].grid()
lines["bnb_fp4"] = CODEBOOKS["bnb_fp4"].grid()

figure, axis = plt.subplots(figsize=(9, 2.6))
for row, (name, values) in enumerate(lines.items()):
    axis.plot(values, np.full(len(values), -row), "|", markersize=18, label=name)
axis.set_yticks(-np.arange(len(lines)), labels=lines)
axis.set_xlabel("value / largest value")
axis.set_title("What four bits can say")
plt.show()

# %% [markdown]
# ## Relative error against magnitude
#
# Inside its normal range a float has a constant relative precision: half an epsilon, in a saw that repeats every
# binade. Below the smallest normal number the error grows as the values run out, until everything rounds to zero and
# the error is 100 %. Above the largest value it saturates (or overflows).

# %%
magnitudes = np.geomspace(2.0**-24, 2.0**18, 4001).astype(np.float32)
figure, axis = plt.subplots(figsize=(9, 4))
for name in ("bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "int8"):
    rounded = np.asarray(pl.round_to(magnitudes, name, overflow="saturate"))
    axis.loglog(magnitudes, np.maximum(np.abs(rounded - magnitudes) / magnitudes, 1e-5), linewidth=0.8, label=name)
axis.set_xscale("log", base=2)
axis.set_xlabel("magnitude")
axis.set_ylabel("relative error")
axis.legend(ncols=5, fontsize="small")
plt.show()

# %% [markdown]
# ## Exponent windows
#
# The exponents each format covers: `=` for normal numbers, `-` for subnormal ones. float16 gradients underflow because
# its window ends at $2^{-24}$; bfloat16 has the window of float32 and pays for it with its mantissa.

# %%
for name in ("float32", "bfloat16", "float16", "float8_e5m2", "float8_e4m3fn", "float4_e2m1fn"):
    print(name)
    print(exponent_window(pl.format(name)).splitlines()[0])

# %%
figure, axis = plt.subplots(figsize=(9, 2.8))
names = ("float32", "tf32", "bfloat16", "float16", "float8_e5m2", "float8_e4m3fn", "float6_e3m2fn", "float4_e2m1fn")
for row, name in enumerate(names):
    fmt = pl.format(name)
    top, lowest = fmt.max_code // 2**fmt.mantissa_bits - fmt.bias, fmt.min_exponent - fmt.mantissa_bits
    axis.barh(-row, fmt.min_exponent - lowest, left=lowest, color="tab:orange", label="subnormal" if row == 0 else None)
    axis.barh(
        -row, top + 1 - fmt.min_exponent, left=fmt.min_exponent, color="tab:blue", label="normal" if row == 0 else None
    )
axis.set_yticks(-np.arange(len(names)), labels=names)
axis.set_xlabel("exponent (power of two)")
axis.legend()
plt.show()

# %% [markdown]
# ## One scale for a block
#
# Narrow formats get their range from a scale that neighbours share. MX formats use powers of two, NVFP4 a float8 scale
# for 16 elements and one float32 for the array. The price is a fraction of a bit per element; what is bought is that
# an outlier spoils its own block only.

# %%
weights = (np.random.default_rng(0).standard_normal((64, 256)) * 0.02).astype(np.float32)
weights[0, 7] = 1.0
for name in ("mxfp8", "mxfp6", "mxint8", "nvfp4", "mxfp4", "mxfp4:rceil", "bfp4@16"):
    error = np.asarray(round_to_blocks(weights, name)) - weights
    noise_db = 10 * np.log10((weights**2).sum() / (error**2).sum())
    bits = float(block_format(name).bits_per_element(weights.shape))
    print(f"{name:12} {bits:6.3f} bits per element, signal to noise {noise_db:5.1f} dB")

# %% [markdown]
# Rounding and storing are the same function: decoding the stored codes gives the rounded array, bit for bit.

# %%
stored = encode_blocks(weights, "nvfp4")
print("codes", stored.codes.dtype, stored.codes.shape, "- scales", stored.scales.dtype, stored.scales.shape)
print("identical:", bool((stored.decode() == round_to_blocks(weights, "nvfp4")).all()))
