"""Where the states of a model's quantizers live: a module of variables by site and operand, in NNX."""

from __future__ import annotations

from typing import Any

from flax import nnx

from precision_lab.nn.fake_quant import QuantParam, QuantStat

STATES = "quantizer_states"  # attribute of an NNX model; key in the collections "params" and "quant_stats" of Linen


class QuantizerStates(nnx.Module):
    """What quantizers of a model learn, each a `QuantParam`, and their running numbers, each a `QuantStat`.

    Attributes:
      sites: of each site by name, and operand ("lhs", "rhs"), the numbers by name.
      use_running_average: True in evaluation; `model.train()` and `model.eval()` set it.

    Args:
      state: as of `QAT`.
    """

    def __init__(self, state: dict[str, Any]) -> None:
        self.use_running_average = False
        self.sites = nnx.Dict()
        for kind, variable in (("learned", QuantParam), ("running", QuantStat)):
            for site, roles in state[kind].items():
                for role, numbers in roles.items():
                    at_site = self.sites.setdefault(site, nnx.Dict())
                    at_site.setdefault(role, nnx.Dict()).update({name: variable(x) for name, x in numbers.items()})

    @property
    def state(self) -> dict[str, Any]:
        """Returns what the variables hold, as of `QAT`."""
        found: dict[str, Any] = {"learned": {}, "running": {}}
        for site, roles in self.sites.items():
            for role, numbers in roles.items():
                for name, variable in numbers.items():
                    kind = found["learned" if isinstance(variable, QuantParam) else "running"]
                    kind.setdefault(site, {}).setdefault(role, {})[name] = variable[...]
        return found

    def move(self, state: dict[str, Any]) -> None:
        """Writes running numbers after a step."""
        for site, roles in state["running"].items():
            for role, numbers in roles.items():
                for name, array in numbers.items():
                    self.sites[site][role][name][...] = array
