"""`Policy`: the number format of parameters, products, accumulators and outputs, with rules by site.

A policy is data: frozen, hashable, equal when it means the same, and printed as the string it parses from. What it
does to a computation is the business of `precision_lab.rewrite`.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, TypeVar

from precision_lab import formats
from precision_lab.formats import Format
from precision_lab.policy.casting import cast_floating
from precision_lab.policy.patterns import glob_matches

if TYPE_CHECKING:
    import jmp

Tree = TypeVar("Tree")

FLOAT32 = formats.format("float32")
FLOAT64 = formats.format("float64")


@dataclasses.dataclass(frozen=True)
class Rule:
    """What differs at the sites that `pattern` matches; None leaves a setting as the policy has it.

    Attributes:
      pattern: glob over a site's path or full name. `*` stays within one path component, `**` spans any number:
        `**/head/**` matches `head/kernel` and `decoder/head/kernel`; `**:conv_general_dilated*` matches by operation.
      compute: format of the operands of the three products.
      accum: format of their accumulator.
    """

    pattern: str
    compute: Format | None = None
    accum: Format | None = None

    def matches(self, *names: str) -> bool:
        """Returns whether the pattern matches any of a site's names."""
        return any(glob_matches(self.pattern, name) for name in names)

    def __str__(self) -> str:
        settings = [(key, getattr(self, key)) for key in ("compute", "accum")]
        return f"{self.pattern}:" + ",".join(f"{key}={fmt.name}" for key, fmt in settings if fmt is not None)


@dataclasses.dataclass(frozen=True)
class Policy:
    """The number format of every tensor of a computation.

    Attributes:
      params: how parameters are stored.
      compute: operands of every product, forward and backward; each operand is cast where it is used.
      output: floating outputs of the function or model.
      accum: what products accumulate in; also their result, before it returns to the type the model expects.
      rules: exceptions by site; where several match, the last one wins, setting by setting.

    Source: the three-dtype policy and its strings follow jmp (google-deepmind/jmp, `jmp.get_policy`): what is not
      given follows its left neighbour in params -> compute -> output (unless compute is narrower than 16 bits or
      simulated: then outputs follow params). `half` is float16 here on every device,
      while jmp's depends on the device that parses it.
    """

    params: Format = FLOAT32
    compute: Format = FLOAT32
    output: Format = FLOAT32
    accum: Format = FLOAT32
    rules: tuple[Rule, ...] = ()

    def __post_init__(self) -> None:
        _require_products(self.compute, self.accum, where="")
        for key in ("params", "output"):
            _require_storable(key, getattr(self, key))
        for rule in self.rules:
            where = f" in rule '{rule.pattern}'"
            _require_products(rule.compute or self.compute, rule.accum or self.accum, where=where)

    @classmethod
    def parse(cls, spec: str | Policy | jmp.Policy | Any) -> Policy:
        """Returns the policy that `spec` describes.

        Args:
          spec: a Policy; a jmp.Policy; a preset's name; a string such as
            `"params=float32,compute=bfloat16,output=float32"` (any jmp string, also `p=f32,c=bf16,o=f32`), followed by
            rules as in `";**/head/**:compute=float32"`; or one format, name or dtype, for all three.

        Raises:
          ValueError: an unknown or repeated key, an unknown format, or a setting that cannot be honoured.
        """
        from precision_lab.policy.parsing import parse_policy

        return parse_policy(spec)

    @classmethod
    def preset(cls, name: str) -> Policy:
        """Returns the preset called `name`; `precision_lab.policy.PRESETS` lists them with their sources."""
        from precision_lab.policy.presets import preset

        return preset(name)

    def with_rule(self, pattern: str, *, compute: Any = None, accum: Any = None) -> Policy:
        """Returns this policy with one more rule, which overrides the earlier ones where it matches.

        Args:
          pattern: glob over site paths, see `Rule`. A rule that matches no site is an error when the policy is
            applied, because only then the sites are known.
          compute: format (or its name) of the operands at those sites.
          accum: format (or its name) of the accumulator there.

        Raises:
          ValueError: the rule sets nothing, or a format that products cannot have.
        """
        if compute is None and accum is None:
            raise ValueError(f"rule '{pattern}' sets nothing; give compute= or accum=.")
        if not pattern or any(char in pattern for char in ";,= "):
            raise ValueError(f"rule pattern '{pattern}' must be non-empty, without spaces and any of , ; =")
        rule = Rule(pattern, *(None if spec is None else formats.format(spec) for spec in (compute, accum)))
        return dataclasses.replace(self, rules=(*self.rules, rule))

    def at(self, *names: str) -> tuple[Format, Format]:
        """Returns (compute, accum) at the site that goes by `names`, rules applied in order."""
        compute, accum = self.compute, self.accum
        for rule in self.rules:
            if rule.matches(*names):
                compute, accum = rule.compute or compute, rule.accum or accum
        return compute, accum

    def cast_to_param(self, tree: Tree) -> Tree:
        """Returns `tree` with its floating arrays in the params dtype; see `cast_floating` for what stays."""
        return cast_floating(tree, self.params.dtype)

    def cast_to_compute(self, tree: Tree) -> Tree:
        """Returns `tree` with its floating arrays in the compute dtype, as jmp does at entry.

        `apply_policy` never does this: casting at entry accumulates the gradient of a weight that is used many times
        in the low precision. This is for code that threads dtypes by hand.
        """
        _require_storable("compute", self.compute)
        return cast_floating(tree, self.compute.dtype)

    def cast_to_output(self, tree: Tree) -> Tree:
        """Returns `tree` with its floating arrays in the output dtype; see `cast_floating` for what stays."""
        return cast_floating(tree, self.output.dtype)

    def to_jmp(self) -> jmp.Policy:
        """Returns the jmp policy of the same three dtypes.

        Raises:
          ValueError: the policy says more than jmp can hold (rules, another accumulator, a simulated format).
        """
        import jmp

        if self.rules or self.accum != default_accum(self.compute):
            raise ValueError(f"jmp has no rules and no accumulator; this policy has: '{self}'.")
        _require_storable("compute", self.compute)
        return jmp.Policy(self.params.dtype, self.compute.dtype, self.output.dtype)  # pyright: ignore[reportArgumentType]

    def __str__(self) -> str:
        base = f"params={self.params.name},compute={self.compute.name},output={self.output.name}"
        if self.accum != default_accum(self.compute):
            base += f",accum={self.accum.name}"
        return ";".join([base, *map(str, self.rules)])

    def __repr__(self) -> str:
        return f"Policy.parse('{self}')"


def default_accum(compute: Format) -> Format:
    """Returns float64 for float64 products and float32 for all others."""
    return FLOAT64 if compute == FLOAT64 else FLOAT32


def _require_storable(key: str, fmt: Format) -> None:
    """Raises unless arrays of `fmt` exist as a floating dtype."""
    _require_sign_and_zero(key, fmt)
    if fmt.kind != "float" or fmt.dtype is None:
        reason = "it has no array dtype" if fmt.dtype is None else "integers need a scale, which no cast has"
        raise ValueError(
            f"{key}={fmt.name} cannot store floating tensors: {reason}. Choose float32, bfloat16, float16..."
        )


def _require_sign_and_zero(key: str, fmt: Format) -> None:
    """Raises for formats of scales, in which no tensor survives a cast."""
    if fmt.kind == "float" and not (fmt.signed and fmt.has_zero):
        raise ValueError(f"{key}={fmt.name} has no sign or no zero: it is a format for scales, not for tensors.")


def _require_products(compute: Format, accum: Format, *, where: str) -> None:
    """Raises unless products of `compute` operands can accumulate in `accum`."""
    if compute.kind != "float":
        raise ValueError(
            f"compute={compute.name}{where} is not a floating format; a cast has no scale to give integers."
        )
    _require_sign_and_zero("compute", compute)
    if accum != default_accum(compute):
        raise ValueError(
            f"accum={accum.name}{where} is not available with compute={compute.name}: these products accumulate in "
            f"{default_accum(compute).name}."
        )
