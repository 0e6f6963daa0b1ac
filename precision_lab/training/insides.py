"""What a finished run's numbers look like inside: error of each site's product, exponents of weights and gradients."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from precision_lab import data, models
from precision_lab.formats import BlockFormat, Codebook, Format
from precision_lab.formats.scalar import power_of_two
from precision_lab.models import DataSpec
from precision_lab.optim import scale_loss
from precision_lab.policy import Policy
from precision_lab.telemetry import compare
from precision_lab.telemetry.reading import exponent_of, window
from precision_lab.training.checkpointing import Checkpoints
from precision_lab.training.config import RunConfig
from precision_lab.training.program import cross_entropy, model_under, program_for
from precision_lab.training.qat import has_state
from precision_lab.training.state import TrainState
from precision_lab.training.states import bare

_EXAMPLES = 64


def look_inside(config: RunConfig, checkpoint_dir: Path) -> dict[str, Any] | None:
    """Returns what the final checkpoint of a run shows, as plain data; None if there is no checkpoint.

    Returns:
      `step`: of the checkpoint. `sites`: for each product `site`, `sqnr_db` (signal to noise of the product alone,
      given float32's operands) and `cumulative_db` (of the same output in a run wholly under the policy), on the first
      held-out examples. `tensors`: for `weights` and `gradients` (as backpropagation leaves them, the loss scaled) the
      `binades` (how many values by exponent), the `format` that they are put in, its `window` (exponents of its
      smallest value, of its smallest with full precision, and of its largest; of scaled formats with the largest
      weight at the top), and the shares that are `zero`, `below` and `above`.

    Raises:
      ValueError: the checkpoint belongs to another config, or the model cannot be traced.
    """
    dataset = data.load(config.data)
    program = program_for(config, dataset.spec)
    with Checkpoints(checkpoint_dir, config) as checkpoints:
        restored = checkpoints.restore(program.state_shapes)
    if restored is None:
        return None
    state, policy = restored.state, Policy.parse(config.policy)
    batch = dataset.eval.take(np.arange(min(_EXAMPLES, len(dataset.eval))))
    tensors = {
        "weights": _described(bare(state.params), _format_of(policy, "weight")),
        "gradients": _described(bare(_gradients(config, dataset.spec, state, batch)), _format_of(policy, "gradient")),
    }
    return {"step": int(state.step), "sites": _sites(config, dataset.spec, state, batch["inputs"]), "tensors": tensors}


def _sites(config: RunConfig, spec: DataSpec, state: TrainState, inputs: Any) -> list[dict[str, Any]]:
    """Returns the errors of each site against float32, local and cumulative, in dB.

    None of a model with adapters, nor of one whose quantizers have a state.
    """
    policy = Policy.parse(config.policy)
    if policy == Policy.parse("float32") or config.lora is not None or has_state(config.policy):
        return []
    model = nnx.merge(nnx.split(models.build(config.model, spec, 0))[0], state.params, state.model_state)
    model.eval()
    return [
        {"site": row.site, "sqnr_db": row.local.sqnr_db, "cumulative_db": row.cumulative.sqnr_db}
        for row in compare(model, ["float32", policy], inputs).rows
        if row.local is not None
    ]


def _gradients(config: RunConfig, spec: DataSpec, state: TrainState, batch: Any) -> Any:
    """Returns the gradients of the scaled loss on a batch, of what the run trains."""
    graph = model_under(config, spec, Policy.parse(config.policy)).eval

    def loss(params: Any) -> jax.Array:
        logits = nnx.merge(graph, params, state.model_state)(batch["inputs"])  # type: ignore[operator]
        found = jnp.mean(cross_entropy(logits, batch["targets"])) * 2.0**-config.train.loss_shift
        return scale_loss(found, state.opt_state)

    return jax.jit(jax.grad(loss))(state.params)


def _format_of(policy: Policy, key: str) -> tuple[Any, bool]:
    """Returns the format that weights or gradients are put in, and whether a scale fits it to their range."""
    quantizer = getattr(policy, key)
    if quantizer is not None:
        return quantizer.format, quantizer.scheme != "unscaled" or isinstance(quantizer.format, BlockFormat)
    backward = policy.dgrad if key == "gradient" else None
    return backward or policy.compute or policy.params, False


def _described(tree: Any, put_in: tuple[Any, bool]) -> dict[str, Any]:
    """Returns the exponents of all values of a tree together, and what the format makes of them."""
    leaves = [np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)]
    values = np.abs(np.concatenate(leaves)) if leaves else np.zeros(0)
    finite = values[np.isfinite(values) & (values > 0)]
    # Exponent fields of float64, in which no float32 is subnormal.
    exponents, counts = np.unique((finite.view(np.int64) >> 52) - 1023, return_counts=True)
    fmt, scaled = put_in
    lowest, normal, top = _window(fmt, float(finite.max(initial=0.0)) if scaled else None)
    total = max(values.size, 1)
    return {
        "binades": {str(int(e)): int(n) for e, n in zip(exponents, counts, strict=True)},
        "format": fmt.name + (", scaled" if scaled else ""),
        "window": [lowest, normal, top],
        "zero": float(np.sum(values == 0) / total),
        "below": float(np.sum(finite < float(power_of_two(lowest))) / total),
        "above": float(np.sum(finite >= float(power_of_two(top + 1))) / total),
    }


def _window(fmt: Format | Codebook | BlockFormat, amax: float | None) -> tuple[int, int, int]:
    """Returns the exponents that a format covers, moved so that `amax` is its largest where a scale does that."""
    if isinstance(fmt, Codebook):
        levels = sorted(abs(float(value)) for value in fmt.levels if value)
        found = (exponent_of(levels[0]), exponent_of(levels[0]), exponent_of(levels[-1]))
    else:
        found = tuple(window(fmt.element if isinstance(fmt, BlockFormat) else fmt))
    if not amax:
        return found  # pyright: ignore[reportReturnType] (three exponents)
    shift = exponent_of(amax) - found[2]
    return found[0] + shift, found[1] + shift, found[2] + shift
