# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Reproducing a figure: which gradients does float16 lose?
#
# Figure 3 of [Micikevicius et al., Mixed Precision Training, 2018](https://arxiv.org/abs/1710.03740) is a histogram of
# the activation gradients that a Multibox SSD network has in float32. Two thirds of them, 66.8 %, are zero as they
# are; most of the rest lies so far to the left that float16 would make it zero as well, while a large part of
# float16's range, on the right, is not used at all. Multiplying the loss by a power of two moves the whole histogram
# to the right.
#
# This notebook draws that figure for a small network of our own, and then asks whether it is right: does the float32
# histogram alone predict what a real float16 backward pass loses, and what training does?

# %%
import collections
import functools
import operator
import tempfile

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits

import precision_lab as pl
from precision_lab.telemetry.pictures import draw_histogram

float16 = pl.format("float16")
print(f"float16 has full precision from {float16.min_normal:g}, and nothing below {float16.min_subnormal:g}.")

# %% [markdown]
# ## A network, a little trained
#
# Three hidden layers of ReLU on scikit-learn's digits, after thirty steps of Adam in plain float32.


# %%
class Digits(nnx.Module):
    def __init__(self, rngs):
        he = nnx.initializers.he_normal()
        self.layers = nnx.List([nnx.Linear(n, 128, kernel_init=he, rngs=rngs) for n in (64, 128, 128)])
        self.head = nnx.Linear(128, 10, rngs=rngs)

    def __call__(self, x, labels):
        for layer in self.layers:
            x = jax.nn.relu(layer(x))
        logits = self.head(x).astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


images, labels = load_digits(return_X_y=True)
images, labels = (images[:1024] / 16).astype(np.float16), labels[:1024]
model = Digits(nnx.Rngs(0))
loss_and_gradients = nnx.jit(nnx.value_and_grad(operator.call))
optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param)
for _ in range(30):
    loss, gradients = loss_and_gradients(model, images.astype(np.float32), labels)
    optimizer.update(model, gradients)

# %% [markdown]
# ## Figure 3, for this network
#
# `observe` counts the exponents of the gradients of every layer's result. Added up over the layers they are the
# paper's histogram. Green is where float16 has full precision, yellow where it has subnormals only; what is left of
# the yellow becomes zero.

# %%
gradients_of = {"roles": ["output_cotangent"], "rounding": False}
seen = pl.observe(model, images.astype(np.float32), labels, **gradients_of)
readings = [reading for _, reading in seen]
total = sum(reading.count for reading in readings)
binades = collections.Counter()
for reading in readings:
    binades.update(reading.binades)
zero = sum(reading.zeros for reading in readings) / total
lost = sum(reading.count * reading.flushed(float16) for reading in readings) / total

figure, axis = plt.subplots(figsize=(11, 3.6), layout="constrained")
axis.axvspan(-24.5, -14.5, color="#f2dfb0", lw=0, label="float16: subnormal")
axis.axvspan(-14.5, 15.5, color="#bfdfc4", lw=0, label="float16: full precision")
axis.bar(binades.keys(), [100 * count / total for count in binades.values()], width=0.9, color="#34495e")
axis.set_xlim(-50, 16)
axis.set_xlabel("exponent of 2 of the magnitude")
axis.set_ylabel("% of all gradients")
axis.set_title(f"{100 * zero:.1f} % are zero, {100 * lost:.2f} % more would become zero in float16")
axis.legend(loc="upper right")
plt.show()

# %% [markdown]
# The shape is the paper's: exact zeros (ReLU), a broad hump, most of the range on the right unused. Where it lies
# depends on the loss, here a mean over a thousand examples. So we move it: multiplying the loss by $2^{-k}$ multiplies
# every gradient by $2^{-k}$. Nothing but an exponent changes, and float32 does not notice.

# %%
shifts = (0, 8, 12, 16)
figure, axes = plt.subplots(1, len(shifts), figsize=(14, 2.6), sharex=True, sharey=True, layout="constrained")
for axis, k in zip(axes, shifts, strict=True):
    shifted = pl.observe(
        model, images.astype(np.float32), labels, **gradients_of, loss=functools.partial(operator.mul, 2.0**-k)
    )
    draw_histogram(
        axis, shifted["layers/0/kernel", "output_cotangent"], float16, f"first layer, loss times $2^{{-{k}}}$"
    )
axes[0].set_xlim(-60, 0)
axes[0].set_ylabel("share of elements")
plt.show()

# %% [markdown]
# ## Prediction against measurement
#
# The prediction uses the unshifted float32 histogram alone: at shift $k$, what lies below $2^{-25 + k}$ (half of the
# smallest float16 number, which is where rounding goes to zero) is lost. The measurement is a real backward pass with
# float16 weights, products and gradients.

# %%
dose = range(0, 21, 2)
measured = {
    k: pl.observe(
        model, images, labels, policy="float16_pure", **gradients_of, loss=functools.partial(operator.mul, 2.0**-k)
    )
    for k in dose
}
figure, axes = plt.subplots(1, len(seen.sites), figsize=(14, 3), sharey=True, layout="constrained")
for axis, (mark, reading) in zip(axes, seen, strict=True):
    below = [sum(n for exponent, n in reading.binades.items() if exponent < -25 + k) for k in dose]
    axis.plot(dose, [100 * (reading.zeros + n) / reading.count for n in below], "k-", label="predicted")
    real = [measured[k][mark.site, "output_cotangent"] for k in dose]
    axis.plot(dose, [100 * one.zeros / one.count for one in real], "o", label="measured")
    axis.set_title(mark.site)
    axis.set_xlabel("k: loss times $2^{-k}$")
axes[0].set_ylabel("% of gradients that are zero")
axes[0].legend()
plt.show()

# %% [markdown]
# The layers from the last to the second lie on the prediction. The first one, which gradients reach last, loses a
# little more than predicted: what arrives there has been rounded in every layer on its way.
#
# ## Which loss scale?
#
# As far to the right as it goes without overflow: the largest power of two that keeps the largest gradient below
# $2^{15}$. With the loss times $2^{-16}$, as if our network were a detector, the histogram says how much that is.

# %%
k = 16
small = pl.observe(
    model, images.astype(np.float32), labels, **gradients_of, loss=functools.partial(operator.mul, 2.0**-k)
)
largest = max(reading.amax for _, reading in small)
exponent = int(14 - np.floor(np.log2(largest)))
print(f"a loss scale of 2^{exponent} for a loss that is 2^{k} times too small")

# %%
scaled = pl.observe(
    model,
    images.astype(np.float32),
    labels,
    **gradients_of,
    loss=functools.partial(operator.mul, 2.0 ** (exponent - k)),
)
figure, axes = plt.subplots(1, 2, figsize=(12, 2.8), sharex=True, sharey=True, layout="constrained")
for axis, observed, title in zip(axes, (small, scaled), ("without a scale", "with it"), strict=True):
    reading = observed["layers/0/kernel", "output_cotangent"]
    draw_histogram(axis, reading, float16, f"first layer {title}: {100 * reading.flushed(float16):.1f} % become zero")
axes[0].set_xlim(-60, 16)
axes[0].set_ylabel("share of elements")
plt.show()

# %% [markdown]
# ## Does training agree?
#
# The same as an experiment: the loss times $2^{-k}$ and the learning rate times $2^k$, which in float32 is the same
# training to the last bit. Each arm has float32 master weights and differs in its formats and its loss scale alone;
# all start from the same weights and see the same batches.

# %%
half = {"policy": "float16_pure", "master_weights": True}
experiment = {
    "name": "gradient_exponents",
    "model": {"kind": "mlp", "hidden": [128, 128, 128]},
    "data": {"kind": "digits", "batch": 128},
    "optim": {"kind": "sgd", "lr": 0.05, "momentum": 0.9},
    "train": {"steps": 150, "loss_shift": 20, "eval_every": 30, "log_every": 30},
    "arms": {
        "float32": {},
        "float16": half,
        "float16_scaled": half | {"loss_scale": {"kind": "static", "scale": 2.0**20}},
        "float16_not_shifted": half | {"train": {"loss_shift": 0}},
    },
}
results = pl.run(experiment, out=tempfile.mkdtemp(), say=str)

# %%
figure, axes = plt.subplots(1, 2, figsize=(12, 3.2), layout="constrained")
for trial in results.trials:
    for axis, metric in zip(axes, ("eval/loss", "train/zero_grad_fraction"), strict=True):
        series = trial.series[metric]
        axis.plot(series.steps, series.values, "o-", label=trial.arm, alpha=0.7)
        axis.set_title(metric)
        axis.set_xlabel("step")
axes[0].set_yscale("log")
axes[0].legend()
plt.show()

# %% [markdown]
# Without a scale the shifted float16 run has lost its gradients and stays where it started; with one it lies on the
# float32 curve, and unshifted it never needed one. That is the paper's table 2 in small: whether loss scaling matters
# is a property of where the histogram lies, and the histogram can be had before anybody trains in float16.
# [experiments/](../experiments/README.md) holds the full ablations, with seeds and verdicts.
