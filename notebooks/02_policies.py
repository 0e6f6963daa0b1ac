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
# # My model under a policy
#
# A policy says which number format every tensor of a computation has. This notebook takes a model that knows nothing of
# it and asks, in this order: what would the policy do, what happens to the gradients, which policy costs how much
# accuracy and where, and how fast is it here.

# %%
import functools
import operator
import time

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits

import precision_lab as pl
from precision_lab.telemetry.pictures import draw_histogram

# %% [markdown]
# ## The model
#
# A few lines of plain Flax. With labels it returns the loss, without them the logits.


# %%
class MyModel(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(64, 256, rngs=rngs)
        self.norm = nnx.LayerNorm(256, rngs=rngs)
        self.down = nnx.Linear(256, 64, rngs=rngs)
        self.head = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, x, labels=None):
        x = x + self.down(self.norm(jax.nn.relu(self.up(x))))
        logits = self.head(x)
        return logits if labels is None else optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


images, labels = load_digits(return_X_y=True)
images, labels = (images[:512] / 16).astype(np.float32), labels[:512]
model = MyModel(nnx.Rngs(0))

# %% [markdown]
# Policies act on calls from outside, `model(...)`, so that is what is differentiated here: `operator.call(model, ...)`.
# Thirty steps of Adam in plain float32, to have gradients as they are in the middle of training.

# %%
loss_and_gradients = nnx.jit(nnx.value_and_grad(operator.call))
optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param)
for _ in range(30):
    loss, gradients = loss_and_gradients(model, images, labels)
    optimizer.update(model, gradients)

# %% [markdown]
# ## What would a policy do?
#
# `sites` lists the products, each by the path of its parameter, and what a policy makes of them. Nothing is executed. A
# policy is a preset, or a string, and both take rules after semicolons: here the head stays in float32.

# %%
print(pl.sites(model, images, policy="bfloat16_mixed"))
print(pl.sites(model, images, policy="float16_mixed;head/**:compute=float32"))

# %% [markdown]
# Applying it gives a model of the same class, with the same variables under the same paths.

# %%
fast = pl.apply_policy(model, "float16_mixed;head/**:compute=float32")
print(type(fast).__name__, fast.up.kernel.dtype, fast(images).dtype)

# %% [markdown]
# Quantizers are written `format@what shares a scale`. Weights, activations and gradients have one each, and a rule may
# take one away.

# %%
print(pl.sites(model, images, policy="weight=int4@group32,activation=int8@token;head/**:weight=int8@channel"))

# %% [markdown]
# ## What does float16 do to the gradients?
#
# `observe` runs the model once and counts the exponents of every tensor at every site, on the device. Below are the
# gradients of the three products' results. Green is where float16 has full precision, yellow where it has subnormals
# only, and what lies to the left becomes zero: the picture of Micikevicius et al. 2018, figure 3, for our model.

# %%
float16 = pl.format("float16")
results = {"policy": "float16_mixed", "roles": ["output_cotangent"], "rounding": False}
as_it_is = pl.observe(model, images, labels, **results)
figure, axes = plt.subplots(1, 3, figsize=(12, 2.8), sharex=True, sharey=True, layout="constrained")
for axis, (mark, reading) in zip(axes, as_it_is, strict=True):
    draw_histogram(axis, reading, float16, f"gradient of the result of {mark.site}")
axes[0].set_xlim(-50, 16)
axes[0].set_ylabel("share of elements")
plt.show()

# %% [markdown]
# Multiplying the loss by $2^{15}$ multiplies every gradient by $2^{15}$: the histogram moves to the right, into the
# window. This is all that loss scaling does; `pl.loss_scaling` finds the factor and takes it out again.

# %%
scaled = pl.observe(model, images, labels, **results, loss=functools.partial(operator.mul, 2.0**15))
figure, axes = plt.subplots(1, 2, figsize=(12, 2.8), sharex=True, sharey=True, layout="constrained")
for axis, seen, title in zip(axes, (as_it_is, scaled), ("loss as it is", "loss times $2^{15}$"), strict=True):
    draw_histogram(axis, seen["down/kernel", "output_cotangent"], float16, f"down/kernel, {title}")
axes[0].set_xlim(-50, 16)
axes[0].set_ylabel("share of elements")
plt.show()

# %%
figure, axis = plt.subplots(figsize=(12, 2.8), layout="constrained")
for seen, title, offset in ((as_it_is, "loss as it is", -0.2), (scaled, "loss times $2^{15}$", 0.2)):
    lost = [100 * reading.flushed(float16) for _, reading in seen]
    axis.bar(np.arange(len(lost)) + offset, lost, width=0.4, label=title)
axis.set_xticks(range(len(as_it_is.sites)), as_it_is.sites)
axis.set_ylabel("% of the gradient\nthat float16 makes zero")
axis.legend()
plt.show()

# %% [markdown]
# ## Which policy costs how much accuracy, and where?
#
# `compare` runs policies beside a reference. The local error of a site is that of its product alone, from the
# reference's operands; the cumulative error is what has piled up there when the whole model runs under the policy. Both
# are signal to noise: 6 dB are one bit.

# %%
policies = ["bfloat16_mixed", "float8_hybrid", "w8a8"]
errors = pl.compare(model, ["float32", *policies], images)
figure, axes = plt.subplots(1, 2, figsize=(12, 3), sharey=True, layout="constrained")
for axis, kind in zip(axes, ("local", "cumulative"), strict=True):
    for number, policy in enumerate(policies):
        found = [getattr(errors.at(site, policy), kind) for site in errors.sites]
        heights = [0 if error is None else error.sqnr_db for error in found]
        axis.bar(np.arange(len(heights)) + 0.27 * (number - 1), heights, width=0.27, label=policy)
    axis.set_xticks(range(len(errors.sites)), errors.sites)
    axis.set_title(f"{kind} error")
axes[0].set_ylabel("signal to noise, dB\n(higher is better)")
axes[0].legend(loc="lower right", fontsize="small")
plt.show()

# %% [markdown]
# ## Accumulators
#
# A product adds up many numbers, and what it adds them up in is a setting too. A sum of ones shows it: float16 holds
# every integer up to 2048, and 2048 + 1 is a tie that goes back to 2048. With four products to an addition it stalls
# at 8192. Promoted to float32 every 128 products, as DeepSeek-V3 does with its FP8 products, it does not stall.

# %%
lengths = 2 ** np.arange(8, 16)
ones = (np.arange(lengths.max()) < lengths[:, None]).astype(np.float32)  # a row for each length, then zeros
figure, axis = plt.subplots(figsize=(9, 3.6), layout="constrained")
for accum, style in (("float32", "k-"), ("float16", "o-"), ("float16@step4", "s-"), ("float16@step4@promote128", "x:")):
    dot = pl.apply_policy(jnp.dot, f"accum={accum}")
    axis.loglog(lengths, dot(ones, np.ones(lengths.max(), np.float32)), style, base=2, label=f"accum={accum}")
axis.set_xlabel("ones in the sum")
axis.set_ylabel("the sum")
axis.legend()
plt.show()

# %% [markdown]
# ## Other operations
#
# Presets like `bfloat16_mixed` act on products and leave the rest as written. With `ops=autocast` the results of
# products stay narrow, and a table (`precision_lab.policy.OP_TABLE`) says of each other operation what it runs in.
# `explain` lists them all, but for functions with a derivative of their own, such as relu, which are kept whole. A rule
# edits the table by operation, by path or by module type.

# %%
print(pl.explain(model, images, policy="bfloat16_autocast;@LayerNorm:op=float32"))

# %% [markdown]
# `round=` rounds the results of operations, one by one. So we can ask of each kind of operation what its rounding to
# bfloat16, and nothing else, does to the logits of this model.

# %%
logits = model(images)
operations = sorted({site.op for site in pl.explain(model, images)} - {"reshape"})
noise = {}
for operation in operations:
    rounded = pl.apply_policy(model, f"float32;**:{operation}#*:round=bfloat16")(images)
    noise[operation] = float(jnp.sqrt(jnp.mean((rounded - logits) ** 2) / jnp.mean(logits**2)))
figure, axis = plt.subplots(figsize=(9, 3.2), layout="constrained")
axis.barh(*zip(*sorted(noise.items(), key=operator.itemgetter(1)), strict=True))
axis.set_xlabel("error of the logits, relative to their size")
axis.set_title("Rounding one kind of operation to bfloat16")
plt.show()

# %% [markdown]
# What must not be touched is put into a region; `full_precision` is a decorator and a context manager.

# %%
careful = pl.full_precision(jnp.dot)
print(pl.sites(careful, jnp.ones((4, 8)), jnp.ones((8, 2)), policy="bfloat16_mixed"))

# %% [markdown]
# ## How fast is it here?
#
# Milliseconds of one forward and backward pass under each policy, taken in turns, on the machine that ran this
# notebook. Formats that the hardware does not have are simulated: that tells what they do, not how fast they would be.

# %%
under = {name: pl.apply_policy(model, name) for name in ("float32", *policies)}
milliseconds = {name: [] for name in under}
for _ in range(11):
    for name, candidate in under.items():
        start = time.perf_counter()
        jax.block_until_ready(loss_and_gradients(candidate, images, labels))
        milliseconds[name].append(1000 * (time.perf_counter() - start))

figure, axis = plt.subplots(figsize=(9, 2.8), layout="constrained")
axis.boxplot([times[1:] for times in milliseconds.values()], orientation="horizontal", showfliers=False)  # 0 compiles
axis.set_yticks(np.arange(len(under)) + 1, under)
axis.invert_yaxis()
axis.set_xlim(left=0)
axis.set_xlabel("ms per forward and backward pass")
plt.show()
