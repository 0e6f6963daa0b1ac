"""A run's model seen from outside: its sites under a policy, and its errors under several, site by site."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from precision_lab import data, models
from precision_lab.models import DataSpec
from precision_lab.nn import explain, sites
from precision_lab.optim import full_precision
from precision_lab.policy import Policy
from precision_lab.rewrite import SiteTable
from precision_lab.telemetry import Comparison, compare
from precision_lab.training.beginning import parameters_at_start
from precision_lab.training.checkpointing import Checkpoints
from precision_lab.training.config import RunConfig
from precision_lab.training.program import batch_shapes, program_for, with_adapters
from precision_lab.training.qat import has_state
from precision_lab.training.start import canonical_policy
from precision_lab.training.states import bare


def sites_of(config: RunConfig, policy: Any = None, *, everything: bool = False) -> SiteTable:
    """Returns the sites of a run's model, as it is evaluated on a batch; from shapes alone, nothing is executed.

    Args:
      config: the run; of adapters (`lora`) the sites are those beside the weights too.
      policy: in place of the run's own.
      everything: list every operation on floating arrays, not only products and lookups.

    Raises:
      ValueError: a rule of the policy matches no site.
    """
    spec = config.data.spec() or data.load(config.data).spec
    asked = Policy.parse(config.policy if policy is None else policy)
    model = nnx.eval_shape(lambda: _built(config, spec, asked))
    model.eval()
    table = explain if everything else sites
    return table(model, batch_shapes(spec, config.data.batch)["inputs"], policy=asked)


def _built(config: RunConfig, spec: DataSpec, policy: Policy) -> nnx.Module:
    """Returns the model that a run trains, adapters and all."""
    model = models.build(config.model, spec, 0)
    return model if config.lora is None else with_adapters(model, config, spec, policy, 0)


class Compared(NamedTuple):
    """What policies do to the model of a run.

    Attributes:
      comparison: the errors.
      step: of the checkpoint that the parameters are from; 0 for those that the run begins with.
      examples: how many held-out examples were looked at.
    """

    comparison: Comparison
    step: int
    examples: int


def compare_policies(
    config: RunConfig,
    policies: list[Any],
    checkpoint_dir: Path | None = None,
    *,
    step: int | None = None,
    examples: int = 64,
    start_from: Path | None = None,
) -> Compared:
    """Returns the errors of policies against the first of them, on the first held-out examples of a run's data.

    Args:
      config: the run.
      policies: two or more.
      checkpoint_dir: where the run has saved its parameters; None takes those that it begins with. Float32 masters are
        taken in the place of what they are the masters of.
      step: which checkpoint, the last if None; 0 takes the parameters that the run begins with.
      examples: how many; the data may have fewer.
      start_from: checkpoints of the run that this one begins from, if any.

    Raises:
      ValueError: the run has adapters, a policy has quantizers with a state, no such checkpoint, or a rule matches no
        site.
    """
    if config.lora is not None:
        raise ValueError(
            "a run with adapters (lora) has two models in one, frozen weights and what is added to them, which no one "
            "policy describes; compare the arm that it starts from."
        )
    for policy in policies:
        if has_state(canonical_policy(policy)):
            raise ValueError(
                f"policy '{policy}' has quantizers that learn or follow running ranges, which are not compared: say "
                "what to hold against the reference without lsq, lsq+, pact and ema."
            )
    dataset = data.load(config.data)
    params, model_state, step = _parameters(config, dataset.spec, checkpoint_dir, step, start_from)
    model = nnx.merge(nnx.split(models.build(config.model, dataset.spec, 0))[0], params, model_state)
    model.eval()
    count = min(examples, len(dataset.eval))
    inputs = dataset.eval.take(np.arange(count))["inputs"]
    return Compared(compare(model, policies, inputs), step, count)


def _parameters(
    config: RunConfig, spec: DataSpec, folder: Path | None, step: int | None, start_from: Path | None
) -> tuple[Any, Any, int]:
    """Returns float32 parameters, the other state of the model, and the step that they are from."""
    program = program_for(config, spec)
    if folder is None or step == 0 or config.train.steps == 0:
        params, model_state, _ = parameters_at_start(config, program, spec, start_from)
        return params, model_state, 0
    restored = None
    if folder.is_dir():  # Opening the checkpoints would make the folder.
        with Checkpoints(folder, config) as checkpoints:
            restored = checkpoints.restore(program.state_shapes, step)
    if restored is None:
        raise ValueError(f"no checkpoint in '{folder}'; --step 0 takes the parameters that the run begins with.")
    state = restored.state
    params = full_precision(state.params, state.opt_state) if config.master_weights else state.params
    return jax.tree.map(lambda x: x.astype("float32"), bare(params)), bare(state.model_state), int(state.step)
