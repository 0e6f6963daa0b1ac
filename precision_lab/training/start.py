"""Where a run begins, as data, and under what else it is evaluated. JAX is not imported here."""

import functools
from typing import TYPE_CHECKING, Annotated, Any, Optional

from pydantic import AfterValidator, BeforeValidator, Field

from precision_lab.models.fields import Bool, FrozenConfig, PositiveFloat, PositiveInt
from precision_lab.policy import Policy

if TYPE_CHECKING:
    from precision_lab.training.config import RunConfig


class StartConfig(FrozenConfig):
    """The run whose final parameters a run begins from; its optimizer starts afresh.

    Parameters that have float32 masters begin from those, all others as they were stored.

    Attributes:
      arm: in an experiment, the arm that the other run belongs to; the seed is the same. No part of any identity.
      run: the other run itself, which an experiment fills in.
      merge: add the adapters that the other run trained (`lora`) to the weights that they stood beside.
    """

    arm: Annotated[str, Field(json_schema_extra={"semantic": False})] = ""
    run: Optional["RunConfig"] = None
    merge: Bool = False


def why_no_start(run: "RunConfig", parent: "RunConfig", name: str) -> tuple[str, str] | None:
    """Returns why a run cannot begin from another, called `name`: (field of `start`, message); None if it can."""
    assert run.start is not None
    if parent.train.steps == 0:
        return "arm", f"{name} trains nothing and saves nothing: start where it does."
    if (parent.lora is not None) != run.start.merge:
        way = "adapters beside its weights: merge: true adds them" if parent.lora else "no adapters to merge"
        return "arm" if parent.lora else "merge", f"{name} ends with {way}."
    if parent.model != run.model:
        return "arm", f"{name} trains another model: what it ends with does not fit this one."
    if parent.data.spec() != run.data.spec():
        return "arm", f"{name} learns data of another shape, so its model is another one."
    return None


class LoRAConfig(FrozenConfig):
    """Adapters of low rank beside the weights, which stay as they are; the adapters alone train, in float32.

    Source: Hu et al. 2021, arXiv:2106.09685, section 4.1; beside quantized weights Dettmers et al. 2023,
      arXiv:2305.14314.

    Attributes:
      rank: of each adapter.
      alpha: they are added times alpha / rank; 2 * rank unless given.
      paths: glob of the weights that get one, such as "blocks/**".
    """

    rank: PositiveInt
    alpha: PositiveFloat | None = None
    paths: str = "**"


class Policies(dict[str, str]):
    """Policies by name, hashable so that a config with them is."""

    def __hash__(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return hash(tuple(sorted(self.items())))


def _canonical(policies: Any) -> Any:
    """Returns policies as their canonical strings."""
    if policies is None:  # `evals: null` takes away what an arm would inherit
        return {}
    if not isinstance(policies, dict):
        raise ValueError(f"expected names with a policy each, such as int4: 'weight=int4@channel', got {policies!r}")
    by_name: dict[str, str] = {}
    for name in map(str, policies):
        if name.lower() == "train":
            raise ValueError(
                "no policy may be called 'train': its eval_train/ is the training split under the run's own"
            )
        if (other := by_name.setdefault(name.lower(), name)) != name:
            raise ValueError(f"{other!r} and {name!r} would share a column of the store, which tells no capitals apart")
    return {str(name): canonical_policy(policy) for name, policy in policies.items()}


def canonical_policy(value: Any) -> str:
    """Returns a policy as its canonical string.

    Raises:
      ValueError: it is none.
    """
    if not isinstance(value, str | Policy):
        raise ValueError(f"expected a policy such as float32 or 'params=float32,compute=bfloat16', got {value!r}")
    return str(Policy.parse(value))


Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.@+-]*$", max_length=64)]


@functools.lru_cache(maxsize=1024)
def quantizes_parameters(policy: str) -> bool:
    """Returns whether a policy has a quantizer for parameters, somewhere."""
    parsed = Policy.parse(policy)
    keys = ("weight", "embedding")
    return any(getattr(parsed, key) is not None for key in keys) or any(rule.quantizes(*keys) for rule in parsed.rules)


NamedPolicies = Annotated[dict[Name, str], BeforeValidator(_canonical), AfterValidator(Policies)]
"""Field type: policies by name."""
