"""Bias correction: quantized weights shift the mean of what a layer returns, and its bias can take the shift back.

Empirical: the means of each product are measured in both models on the same data. Analytic: the shift follows from the
mean of the layer's input, which a batch norm before it knows without data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.stats import norm

from precision_lab.nn.apply import apply_policy, sites
from precision_lab.nn.batch_norm import shifts_of_folded
from precision_lab.nn.calibration import as_call
from precision_lab.nn.pure import apart, signature
from precision_lab.ptq.parts import Parts, taken_apart
from precision_lab.quant import QTensor
from precision_lab.rewrite import OUTPUT, Collector, Mark, Site, harvest, observing, trace
from precision_lab.rewrite.parameters import dequantized, shape_of
from precision_lab.rewrite.printing import table_text

INPUTS = ("quantized", "float")
ACTIVATIONS = ("none", "relu", "relu6")
Means = dict[tuple[str, str], np.ndarray]


@dataclass(frozen=True)
class BiasCorrection:
    """A model with corrected biases. Prints as a table.

    Attributes:
      model: the quantized model, in the form in which it was given.
      shifts: what was added to each bias, by the path of its kernel, float32 of the bias's shape.
      skipped: why the other products with a parameter have no correction, by site.
    """

    model: Any
    shifts: dict[str, np.ndarray]
    skipped: dict[str, str]

    def __str__(self) -> str:
        from rich.table import Table

        table = Table("kernel", "mean |shift|", "largest", title="bias correction")
        for path, shift in self.shifts.items():
            table.add_row(path, f"{np.abs(shift).mean():.4g}", f"{np.abs(shift).max():.4g}")
        for site, why in self.skipped.items():
            table.add_row(site, why, "")
        return table_text(table, width=140)


def correct_biases(model: Any, quantized: Any, batches: Iterable[Any], *, inputs: str = "quantized") -> BiasCorrection:
    """Returns the quantized model with biases that give its products the means that they have in `model`.

    The bias of a kernel is the parameter `bias` beside it, or that of the batch norm which `nn.fold_batch_norms` has
    folded into it. To it is added E[y] - E[y_q], the mean over examples and
    positions of the product in float32 and as quantized.

    Args:
      model: an `nnx.Module`; or a pair (linen.Module, variables) or (function, params). Run in float32.
      quantized: the same under a policy or converted, as `apply_policy` and `convert` return it, in the same form.
      batches: what the model is called with, as for `pl.calibrate`; kept in memory.
      inputs: what the quantized products get. "quantized": what they get in the quantized model, the biases of all
        layers before being corrected already, so that the layers are done in program order. "float": what they get in
        `model`: the shift is E[x] (W - W_q) and comes from the weights alone. A convolution's padding is then taken
        for more of the same mean, as in the paper; weights must be stored (`pl.convert`).

    Returns:
      A BiasCorrection, with the reasons where a product has none: no bias beside the kernel, or a kernel used twice.

    Raises:
      ValueError: unknown `inputs`, no batches, `quantized` is under no policy, or there is no bias to correct.
      TypeError: a model in none of these forms.

    Source: Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", 2019,
      arXiv:1906.04721, appendix D for the empirical form, section 4.2 and appendix B for the other. Like theirs,
      `inputs="quantized"` goes layer after layer; here the means are of products, before the bias is added.
    """
    if inputs not in INPUTS:
        raise ValueError(f"inputs={inputs!r} must be 'quantized' or 'float'.")
    calls = [as_call(batch) for batch in batches]
    if not calls:
        raise ValueError("correct_biases got no batches; give at least one, such as [x].")
    exact, rough = taken_apart(model), taken_apart(quantized)
    found, skipped = _layers(exact, rough, calls[0])
    expected = _means(exact.under(lambda target: apply_policy(target, "float32")), calls, found, {})
    if not found:
        why = f" ('{next(iter(skipped))}': {next(iter(skipped.values()))})" if skipped else ""
        raise ValueError(f"there is no bias to correct{why}.")
    if inputs == "float":
        shifts = _from_weights(exact, rough, found, expected, skipped)
    else:
        shifts = _in_order(rough, calls, found, expected)
    biases = {layer.bias: _shifted(rough.params[layer.bias], shifts[path]) for path, layer in found.items()}
    return BiasCorrection(rough.with_params(biases), shifts, skipped)


def expected_activation(mean: Any, deviation: Any, activation: str = "none") -> jax.Array:
    """Returns E[f(x)] of a normal x: what a layer after a batch norm and an activation function gets on average.

    Args:
      mean, deviation: arrays of one shape; of a batch norm its bias and its scale, whose sign does not matter.
      activation: f: "none", "relu" or "relu6".

    Raises:
      ValueError: another activation.

    Source: Nagel et al., 2019, arXiv:1906.04721, section 4.2 and appendix C: the mean of a clipped normal.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r} must be one of {', '.join(ACTIVATIONS)}.")
    mean, spread = jnp.asarray(mean, jnp.float32), jnp.abs(jnp.asarray(deviation, jnp.float32))
    if activation == "none":
        return mean
    high = 6.0 if activation == "relu6" else math.inf
    scale = jnp.where(spread > 0, spread, 1)
    low_z, high_z = -mean / scale, (high - mean) / scale
    inside = scale * (norm.pdf(low_z) - norm.pdf(high_z)) + mean * (norm.cdf(high_z) - norm.cdf(low_z))
    above = 6.0 * norm.sf(high_z) if activation == "relu6" else 0.0
    return jnp.where(spread > 0, inside + above, jnp.clip(mean, 0, high))


def expected_shift(kernel: Any, quantized: Any, mean: Any) -> jax.Array:
    """Returns E[x] (W - W_q), float32 of the bias's shape: what is to be added to the bias of a quantized layer.

    Args:
      kernel, quantized: float arrays `(..., in, out)`; leading axes are positions of a convolution's window.
      mean: `(in,)`, the mean of the input by channel; of a grouped convolution `(groups * in,)`.

    Source: Nagel et al., 2019, arXiv:1906.04721, section 4.2 and, for convolutions, appendix B.
    """
    lost = jnp.asarray(kernel, jnp.float32) - jnp.asarray(quantized, jnp.float32)
    lost = lost.reshape(-1, *lost.shape[-2:]).sum(0)
    groups = jnp.size(mean) // lost.shape[0]
    by_group = lost.reshape(lost.shape[0], groups, -1)
    return jnp.einsum("gi,igo->go", jnp.reshape(jnp.asarray(mean, jnp.float32), (groups, -1)), by_group).reshape(-1)


class _Layer(NamedTuple):
    """A product with a kernel and a bias.

    Attributes:
      bias: path of the bias.
      outputs: trailing axes of the product that the bias has.
      inputs: trailing axes of the input that are channels.
      stack: leading axes of the kernel over which a scan runs.
    """

    bias: str
    outputs: int
    inputs: int
    stack: int


def _layers(exact: Parts, rough: Parts, call: Any) -> tuple[dict[str, _Layer], dict[str, str]]:
    """Returns the layers whose bias can be corrected, by the path of their kernel, and why others cannot."""
    args, kwargs = call
    own = () if exact.is_module else (exact.given,)
    table = [site for site in sites(exact.target, *own, *args, **kwargs) if site.is_product and site.has_parameter]
    found, skipped = {}, {}
    above = [site.path.rpartition("/")[0] for site in table]
    biases = {name: f"{name}/bias" if name else "bias" for name in above}
    if not exact.is_function and not all(bias in rough.params for bias in biases.values()):
        biases |= shifts_of_folded(exact.target, *own, *args, **kwargs)
    for site, name in zip(table, above, strict=True):
        layer = _layer(site, [other.path for other in table].count(site.path), rough, biases[name])
        if isinstance(layer, str):
            skipped[site.name] = layer
        else:
            found[site.path] = layer
    return found, skipped


def _layer(site: Site, uses: int, rough: Parts, bias: str) -> _Layer | str:
    """Returns the layer of a product with the bias at a path, or why it has none to correct."""
    if bias not in rough.params or bias == site.path:
        return f"no parameter '{bias}'"
    if uses > 1:
        return f"its kernel is used {uses} times"
    if site.quantized_by != ("activation", "weight"):
        return "its kernel is not the right operand"
    left, right, out = (_shape(text) for text in (site.lhs, site.rhs, site.out))
    contracted = (len(left) + len(right) - len(out)) // 2
    inputs, outputs = (1, 1) if site.op != "dot_general" else (contracted, len(right) - contracted)
    shape = np.shape(rough.params[bias])
    stack = len(shape) - outputs
    if stack < 0 or shape[stack:] != out[len(out) - outputs :]:
        return f"its bias {shape} is not the last axes of the product {out}"
    return _Layer(bias, outputs, inputs, stack)


def _shape(text: str) -> tuple[int, ...]:
    """Returns the shape in a description such as "float32[8,128]"."""
    inside = text[text.index("[") + 1 : -1]
    return tuple(int(side) for side in inside.split(",") if side)


def _means(parts: Parts, calls: Sequence[Any], layers: dict[str, _Layer], compiled: dict[Any, Any]) -> Means:
    """Returns the means by channel of the inputs and products of layers, over batches; stacked where a scan runs."""
    sums: dict[Any, Any] = {}
    for args, kwargs in calls:
        given = (parts.params, args, kwargs)
        arrays, together = apart(given)
        if (key := signature(given)) not in compiled:
            compiled[key] = jax.jit(lambda arrays, given=together: _sums(parts.run, layers, *given(arrays)))
        for name, (total, count) in jax.device_get(compiled[key](arrays)).items():
            before = sums.get(name, (0.0, 0.0))
            sums[name] = before[0] + total.astype(np.float64), before[1] + count.astype(np.float64)
    means = {tuple(name.split("\n")): total / np.asarray(count)[(..., *[None] * (np.ndim(total) - np.ndim(count)))]
             for name, (total, count) in sums.items()}  # fmt: skip
    if missing := [path for path in layers if (path, OUTPUT) not in means]:
        raise ValueError(
            f"the product of '{missing[0]}' was not seen: give the quantized model as pl.apply_policy or pl.convert "
            "returned it."
        )
    return means  # pyright: ignore[reportReturnType]


def _sums(run: Callable[..., Any], layers: dict[str, _Layer], params: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """Returns sums and counts by channel of one call."""

    def measure(pairs: Sequence[tuple[Mark, jax.Array]]) -> list[Any]:
        return [_sum(x, layers[mark.site].outputs if mark.role == OUTPUT else layers[mark.site].inputs)
                for mark, x in pairs]  # fmt: skip

    def wanted(mark: Mark) -> bool:
        return mark.site in layers and mark.role in ("lhs", OUTPUT)

    leaves, tree = jax.tree.flatten(params)  # the arrays that QTensors are made of, which `trace` would take whole
    with observing(()):
        traced = trace(lambda leaves: run(jax.tree.unflatten(tree, leaves), *args, **kwargs), leaves, (), {})
    collector = Collector(wanted, measure, lambda a, b: jax.tree.map(jnp.add, a, b), _nothing, stacked=True)
    _, found = harvest(traced.jaxpr, traced.arrays, collector)
    return {f"{mark.site}\n{mark.role}": value for mark, value in found.items()}


def _nothing(like: Any) -> Any:
    """Returns the sums of nothing."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)


def _sum(x: jax.Array, trailing: int) -> tuple[jax.Array, jax.Array]:
    """Returns the sum over all but the trailing axes, and how many were summed.

    It is taken about a first mean: thousands of numbers far from zero, added one by one, lose what a shift is about.
    """
    leading, x = tuple(range(x.ndim - trailing)), x.astype(jnp.float32)
    count = jnp.float32(math.prod(x.shape[: x.ndim - trailing]))
    near = jnp.sum(x, axis=leading) / jnp.maximum(count, 1)
    return near * count + jnp.sum(x - near, axis=leading), count


def _in_order(rough: Parts, calls: Sequence[Any], layers: dict[str, _Layer], expected: Means) -> dict[str, np.ndarray]:
    """Returns the shifts under quantized inputs.

    All biases are corrected at once, again and again. A layer depends on those before it alone, so the first is right
    after one pass, the second after two, and nothing changes any more at the latest after as many as there are layers.
    """
    passes = sum(math.prod(np.shape(rough.params[layer.bias])[: layer.stack]) for layer in layers.values())
    shifts: dict[str, np.ndarray] = {}
    compiled: dict[Any, Any] = {}
    for _ in range(passes):
        biases = {layer.bias: _shifted(rough.params[layer.bias], shifts.get(path)) for path, layer in layers.items()}
        means = _means(rough._replace(params={**rough.params, **biases}), calls, layers, compiled)
        new = {path: (expected[path, OUTPUT] - means[path, OUTPUT]).astype(np.float32) for path in layers}
        if shifts and all(np.array_equal(new[path], shifts[path]) for path in layers):
            break
        shifts = new
    return shifts


def _from_weights(
    exact: Parts, rough: Parts, layers: dict[str, _Layer], expected: Means, skipped: dict[str, str]
) -> dict[str, np.ndarray]:
    """Returns the shifts under float inputs; layers whose weight is not stored quantized go to `skipped`."""
    shifts = {}
    for path, layer in list(layers.items()):
        kernel = rough.params[path]
        if not isinstance(kernel, QTensor):
            skipped[path] = "its kernel is not stored quantized, which inputs='float' needs"
            del layers[path]
            continue
        shape, mean = shape_of(kernel), jnp.asarray(expected[path, "lhs"])
        bias = np.shape(rough.params[layer.bias])
        ends = math.prod(bias[layer.stack :])
        flat = (*shape[: layer.stack], -1, shape[-1 - layer.outputs], ends)
        if layer.inputs > 1:  # the contracted axes are channels all together
            flat = (*shape[: layer.stack], math.prod(mean.shape[layer.stack :]), ends)
        run: Callable[..., jax.Array] = expected_shift
        for _ in range(layer.stack):
            run = jax.vmap(run)
        weights = (x.reshape(flat) for x in (jnp.asarray(exact.params[path], jnp.float32), dequantized(kernel)))
        shifts[path] = np.asarray(run(*weights, mean.reshape(*shape[: layer.stack], -1))).reshape(bias)
    if not layers:
        raise ValueError("inputs='float' needs weights that are stored quantized; give what pl.convert returned.")
    return shifts


def _shifted(bias: Any, shift: Any) -> Any:
    """Returns a bias with a shift, in its dtype."""
    return bias if shift is None else (jnp.asarray(bias, jnp.float32) + shift).astype(bias.dtype)
