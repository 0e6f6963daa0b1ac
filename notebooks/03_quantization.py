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
# # A trained model in 8, 4, 3 and 2 bits
#
# A small classifier is trained in float32 and then stored in fewer and fewer bits. Where does it break, what breaks it,
# and what does training with quantized weights mend?

# %%
import operator

import jax
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits

import precision_lab as pl

# %% [markdown]
# ## The model
#
# Handwritten digits of 8 x 8 pixels, 1400 to train on and 397 to test: an accuracy of 97 % has a standard error of
# 0.9 %, so differences of one or two images mean nothing.


# %%
class MyModel(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(64, 128, rngs=rngs)
        self.mid = nnx.Linear(128, 128, rngs=rngs)
        self.down = nnx.Linear(128, 64, rngs=rngs)
        self.head = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, x, labels=None):
        for layer in (self.up, self.mid, self.down):
            x = jax.nn.relu(layer(x))
        logits = self.head(x)
        return logits if labels is None else optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


images, labels = load_digits(return_X_y=True)
images = (images / 16).astype(np.float32)
order = np.random.default_rng(0).permutation(len(images))
train, test = order[:1400], order[1400:]

model = MyModel(nnx.Rngs(0))
loss_and_gradients = nnx.jit(nnx.value_and_grad(operator.call))
update = nnx.jit(nnx.Optimizer.update)
optimizer = nnx.Optimizer(model, optax.adam(2e-3), wrt=nnx.Param)
for _ in range(200):
    loss, gradients = loss_and_gradients(model, images[train], labels[train])
    update(optimizer, model, gradients)
float32 = 100 * float(np.mean(np.argmax(model(images[test]), -1) == labels[test]))

# %% [markdown]
# ## After training: three kinds of quantization
#
# All three are policies given to `pl.convert`. *Weight-only* stores the weights in few bits and computes in float32.
# *Dynamic* quantizes activations too, each row of a batch under a scale found in the call. *Static* has one scale for
# each activation, found by `pl.calibrate` on data.

# %%
widths = [8, 4, 3, 2]
packed = {}
for bits in widths:
    weight = f"weight=int{bits}@channel"
    both = f"{weight},activation=int{bits}@token"
    packed["weights only", bits] = pl.convert(model, weight, images[test])
    packed["weights and activations, dynamic", bits] = pl.convert(model, both, images[test])
    packed["weights and activations, static", bits] = pl.convert(pl.calibrate(model, both, [images[train]]))

# %% [markdown]
# What the weights really take, scales included. A channel of `mid` shares one float32 scale among 128 weights, which is
# a quarter of a bit for each; of `head` among 64, half a bit.

# %%
print("kernels   bytes    bits a weight: up   mid   down  head")
print(f"float32 {sum(4 * layer.kernel.size for layer in (model.up, model.mid, model.down, model.head)):7}")
for bits in widths:
    stored = [
        getattr(packed["weights only", bits], name).kernel.get_raw_value() for name in ("up", "mid", "down", "head")
    ]
    each = "  ".join(f"{float(kernel.bits_per_element):.2f}" for kernel in stored)
    print(f"int{bits}    {sum(kernel.nbytes for kernel in stored):7}                   {each}")

# %%
accuracy = {key: 100 * float(np.mean(np.argmax(one(images[test]), -1) == labels[test])) for key, one in packed.items()}
figure, axis = plt.subplots(figsize=(9, 3.4), layout="constrained")
for kind, style in zip(dict.fromkeys(kind for kind, _ in packed), ("o-", "s--", "^:"), strict=True):
    axis.plot(range(4), [accuracy[kind, bits] for bits in widths], style, label=kind)
axis.axhline(float32, color="gray", linewidth=0.8)
axis.text(0, float32 - 1.5, "float32", va="top", color="gray")
axis.set_xticks(range(4), [f"{bits} bits" for bits in widths])
axis.set_ylabel("test accuracy, %")
axis.set_ylim(0, 102)
axis.legend(loc="lower left")
plt.show()

# %% [markdown]
# ## Why it breaks: the weights and their grid
#
# The grid reaches as far as the largest weight of a channel, and most weights are much smaller. Below is the channel of
# `mid` with the largest weight in units of its standard deviation. Lines are the values that there are (at 8 bits too
# many to draw); the colour shows which weights become zero. At 2 bits nearly all do.

# %%
kernel = np.asarray(model.mid.kernel[...])
channel = int(np.argmax(np.abs(kernel).max(0) / kernel.std(0)))
column = kernel[:, channel]
figure, axes = plt.subplots(1, 4, figsize=(12, 2.8), sharex=True, sharey=True, layout="constrained")
for axis, bits in zip(axes, widths, strict=True):
    scale = float(pl.quantize(kernel, f"int{bits}@channel", axis=0).scale[0, channel])
    rounded = np.asarray(pl.fake_quantize(kernel, f"int{bits}@channel", axis=0))[:, channel]
    bins = np.linspace(-1, 1, 41) * np.abs(column).max() * 1.02
    axis.hist([column[rounded != 0], column[rounded == 0]], bins, stacked=True, label=["kept", "become zero"])
    if bits < 8:
        for code in range(1 - 2 ** (bits - 1), 2 ** (bits - 1)):
            axis.axvline(code * scale, color="black", linewidth=0.6)
    axis.set_title(f"{bits} bits: {100 * np.mean(rounded == 0):.0f} % become zero")
axes[0].set_ylabel("weights")
axes[0].legend(loc="upper right", fontsize="small")
plt.show()

# %% [markdown]
# A shorter grid clips the few largest weights and resolves the others. `mse` takes the reach with the least squared
# error instead of the largest magnitude.

# %%
figure, axis = plt.subplots(figsize=(9, 3), layout="constrained")
for calibration, style in (("absmax", "o-"), ("mse", "s--")):
    quantized = {bits: pl.fake_quantize(kernel, f"int{bits}@channel,{calibration}", axis=0) for bits in widths}
    noise = [float(np.mean((np.asarray(quantized[bits]) - kernel) ** 2)) for bits in widths]
    axis.plot(range(4), 10 * np.log10(np.mean(kernel**2) / noise), style, label=calibration)
axis.axhline(0, color="gray", linewidth=0.8)
axis.set_xticks(range(4), [f"{bits} bits" for bits in widths])
axis.set_ylabel("weights of mid:\nsignal to noise, dB")
axis.legend()
plt.show()

# %% [markdown]
# ## What shares a scale
#
# The scales of `mid` at 4 bits when the tensor, each channel, or each 16 weights of a channel have their own. Where
# neighbours share one, the largest among them rules; so finer is better, and takes more bits.

# %%
granularities = ["tensor", "channel", "group16"]
figure, axes = plt.subplots(1, 3, figsize=(12, 3), layout="constrained")
shared = {name: pl.quantize(kernel, f"int4@{name}", axis=0) for name in granularities}
top = float(np.max(shared["tensor"].scale))
for axis, (name, stored) in zip(axes, shared.items(), strict=True):
    picture = axis.imshow(np.asarray(stored.scale), aspect="auto", vmin=0, vmax=top, extent=(0, 128, 128, 0))
    decibels = 10 * np.log10(np.mean(kernel**2) / np.mean((np.asarray(stored.dequantize()) - kernel) ** 2))
    axis.set_title(f"int4@{name}: {float(stored.bits_per_element):.2f} bits, {decibels:.1f} dB")
    axis.set_xlabel("output channel")
axes[0].set_ylabel("input")
figure.colorbar(picture, ax=axes, label="scale")
plt.show()

# %% [markdown]
# ## Where it breaks
#
# `compare` gives the error of each layer by itself, and what has piled up there when all layers are quantized. Zero
# decibels are an error as large as the signal.

# %%
policies = {f"int{bits}": f"weight=int{bits}@channel,activation=int{bits}@token" for bits in widths}
errors = pl.compare(model, ["float32", *policies.values()], images[test])
sites = [site for site in errors.sites if site.endswith("kernel")]
figure, axes = plt.subplots(1, 2, figsize=(12, 3), sharey=True, layout="constrained")
for axis, kind in zip(axes, ("local", "cumulative"), strict=True):
    for name, policy in policies.items():
        found = [getattr(errors.at(site, policy), kind).sqnr_db for site in sites]
        axis.plot(range(len(sites)), found, "o-", label=name)
    axis.set_xticks(range(len(sites)), [site.removesuffix("/kernel") for site in sites])
    axis.set_title(f"{kind} error")
    axis.axhline(0, color="gray", linewidth=0.8)
axes[0].set_ylabel("signal to noise, dB")
axes[1].legend(fontsize="small")
plt.show()

# %% [markdown]
# ### Which layer may have fewer bits?
#
# `pl.sensitivity` quantizes one layer at a time, weights and activations, and leaves all others in float32: how far is
# the output from that of float32, in decibels? It is one compiled program for all layers and widths.

# %%
sensitivity = pl.sensitivity(model, list(policies.values()), [images[test]])
sensitivity.heat_map()

# %% [markdown]
# ## Training through the quantizer
#
# The two widths that broke: their policies, applied to the float32 model with `pl.apply_policy`, and a hundred more
# steps of Adam. Weights stay float32 and are quantized in every step; rounding passes gradients on as if it were not
# there (straight-through). The float32 model gets the same steps, to tell what they do by themselves.

# %%
trained = {}
for bits in (3, 2):
    for kind, policy in (
        ("weights only", f"weight=int{bits}@channel"),
        ("weights and activations, dynamic", f"weight=int{bits}@channel,activation=int{bits}@token"),
    ):
        student = pl.apply_policy(model, policy)
        optimizer = nnx.Optimizer(student, optax.adam(1e-3), wrt=nnx.Param)
        for _ in range(100):
            _, gradients = loss_and_gradients(student, images[train], labels[train])
            update(optimizer, student, gradients)
        trained[kind, bits] = pl.convert(student, policy, images[test])
        if policy == "weight=int2@channel":
            learned = np.asarray(student.mid.kernel[...])

student = pl.apply_policy(model, "float32")
optimizer = nnx.Optimizer(student, optax.adam(1e-3), wrt=nnx.Param)
for _ in range(100):
    _, gradients = loss_and_gradients(student, images[train], labels[train])
    update(optimizer, student, gradients)
longer = 100 * float(np.mean(np.argmax(student(images[test]), -1) == labels[test]))

# %%
after = {key: 100 * float(np.mean(np.argmax(one(images[test]), -1) == labels[test])) for key, one in trained.items()}
figure, axes = plt.subplots(1, 2, figsize=(12, 3), sharey=True, layout="constrained")
for axis, kind in zip(axes, dict.fromkeys(kind for kind, _ in trained), strict=True):
    for found, label, offset in ((accuracy, "quantized after training", -0.2), (after, "trained quantized", 0.2)):
        bars = axis.bar(np.arange(2) + offset, [found[kind, bits] for bits in (3, 2)], width=0.4, label=label)
        axis.bar_label(bars, fmt="%.1f", fontsize="small")
    axis.axhline(longer, color="gray", linewidth=0.8, label="float32, trained as long")
    axis.set_xticks(range(2), [f"{bits} bits" for bits in (3, 2)])
    axis.set_title(kind)
axes[0].set_ylabel("test accuracy, %")
axes[0].set_ylim(0, 112)
axes[1].legend(loc="lower left", fontsize="small", framealpha=1)
plt.show()

# %% [markdown]
# How? Not by weights that sit on the grid: those of `mid` are as far from their 2-bit selves as before. On the left,
# their error; on the right, how many of them have which code before and after. A few change, and all layers change
# together: what is small is the error of the loss, not that of the weights.

# %%
student = trained["weights only", 2]
codes = [np.asarray(pl.quantize(kernel, "int2@channel", axis=0).integers)]
codes += [np.asarray(student.mid.kernel.get_raw_value().integers)]
noise = [
    float(np.mean((pl.fake_quantize(w, "int2@channel", axis=0) - w) ** 2) / np.mean(w**2)) for w in (kernel, learned)
]
counts = np.histogram2d(codes[0].ravel(), codes[1].ravel(), bins=[-1.5, -0.5, 0.5, 1.5])[0]
figure, axes = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
axes[0].bar(["trained in float32", "trained at 2 bits"], -10 * np.log10(noise), width=0.5)
axes[0].set_ylabel("weights of mid:\nsignal to noise, dB")
axes[1].imshow(counts**0.5, cmap="Blues")
for (row, column), value in np.ndenumerate(counts):
    axes[1].text(column, row, f"{value:.0f}", ha="center", va="center", color="white" if value > 5000 else "black")
axes[1].set_xticks(range(3), [-1, 0, 1])
axes[1].set_yticks(range(3), [-1, 0, 1])
axes[1].set_xlabel("code after training at 2 bits")
axes[1].set_ylabel("code before")
plt.show()
