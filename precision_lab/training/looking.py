"""A run's model seen from outside: its sites under a policy, and the model itself with its parameters."""

from typing import Any

from flax import nnx

from precision_lab import data, models
from precision_lab.models import DataSpec
from precision_lab.nn import explain, sites
from precision_lab.policy import Policy
from precision_lab.rewrite import SiteTable
from precision_lab.training.config import RunConfig
from precision_lab.training.program import batch_shapes, with_adapters


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
