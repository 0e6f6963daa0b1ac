"""The transforms of a run's first parameters, carried out."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
from flax.traverse_util import flatten_dict, unflatten_dict

from precision_lab.nn.transforms import Audit, Norm, Pair, inject_norm_outliers, rescale_pair, store_as
from precision_lab.policy.patterns import glob_matches
from precision_lab.ptq.equalization import equalize
from precision_lab.training.transforms import (
    AUDITED,
    EqualizeConfig,
    NormOutliersConfig,
    ReLURescaleConfig,
    StoreConfig,
    TransformConfig,
    _AroundReLU,
)

_STREAM = 0x7F4A7C15  # of random numbers, apart from those of the initialisation
Named = dict[str, jax.Array]


def transformed(params: Any, transforms: Sequence[TransformConfig], seed: int) -> tuple[Any, dict[str, float]]:
    """Returns parameters after transforms, in their order, and what the audits of the stores counted, if there are any.

    Args:
      params: nested dicts of float32 arrays.
      transforms: what to do.
      seed: of the run; each transform draws from a stream of its own.

    Raises:
      ValueError: a pattern matches nothing, or matches what does not fit together.
    """
    return _one_by_one(params, list(enumerate(transforms)), seed)


def _one_by_one(params: Any, transforms: list[tuple[int, TransformConfig]], seed: int) -> tuple[Any, dict[str, float]]:
    """Does what `transformed` says, of numbered transforms."""
    flat = flatten_dict(params)
    names = {"/".join(map(str, path)): path for path in flat}
    arrays: Named = {name: flat[path] for name, path in names.items()}  # pyright: ignore[reportAssignmentType]
    counts: list[Audit] = []
    stream = jax.random.fold_in(jax.random.key(seed), _STREAM)
    for i, one in transforms:
        with _named(i, one):
            arrays |= _changes(one, arrays, jax.random.fold_in(stream, i), counts)
    audit = sum(counts, Audit(0, 0, 0, 0))
    named = {name: float(getattr(audit, name)) for name in AUDITED} if counts else {}
    return unflatten_dict({names[name]: array for name, array in arrays.items()}), named


def check_transforms(shapes: Any, transforms: Sequence[TransformConfig]) -> None:
    """Raises ValueError for what `transformed` would refuse, from the shapes of the parameters alone."""
    names = ["/".join(map(str, path)) for path in flatten_dict(shapes)]
    for i, one in enumerate(transforms):
        if isinstance(one, StoreConfig):
            with _named(i, one):
                _matching(one.paths, names)
    others = [(i, one) for i, one in enumerate(transforms) if not isinstance(one, StoreConfig)]
    for i, one in others:
        jax.eval_shape(lambda params, i=i, one=one: _one_by_one(params, [(i, one)], 0)[0], shapes)


@contextmanager
def _named(i: int, one: TransformConfig) -> Iterator[None]:
    """Says of an error which transform it comes from."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"transforms.{i} ({one.kind}): {error}") from None


def _changes(one: TransformConfig, arrays: Named, key: jax.Array, counts: list[Audit]) -> Named:
    """Returns what one transform makes of the parameters that it changes; adds the counts of a store."""
    match one:
        case ReLURescaleConfig():
            return _each_pair(one, arrays, key, lambda pair, key: rescale_pair(pair, _exponents(one, pair, key)))
        case EqualizeConfig():
            return _each_pair(one, arrays, key, lambda pair, key: equalize(pair))
        case NormOutliersConfig():
            return _outliers(one, arrays, key)
        case StoreConfig():
            found = {name: store_as(arrays[name], one.format, clamp=one.clamp) for name in _matching(one.paths, arrays)}
            counts += [audit for _, audit in found.values()]
            return {name: stored for name, (stored, _) in found.items()}
    raise TypeError(f"no transform for {one!r}.")


def _exponents(one: ReLURescaleConfig, pair: Pair, key: jax.Array) -> jax.Array:
    """Returns the exponent of each unit."""
    return one.exponent + jax.random.randint(key, pair.first.shape[-1:], -one.spread, one.spread + 1)


def _each_pair(one: _AroundReLU, arrays: Named, key: jax.Array, change: Callable[[Pair, jax.Array], Pair]) -> Named:
    """Returns the parameters of each pair of kernels after a change."""
    new: Named = {}
    for i, (first, second) in enumerate(_paired(one.first, one.second, arrays)):
        bias = _beside(first, "bias")
        pair = change(Pair(arrays[first], arrays[second], arrays.get(bias)), jax.random.fold_in(key, i))
        new |= {first: pair.first, second: pair.second} | ({} if pair.bias is None else {bias: pair.bias})
    return new


def _outliers(one: NormOutliersConfig, arrays: Named, key: jax.Array) -> Named:
    """Returns the parameters of norms, and of the kernels that read them, after some channels have grown."""
    new: Named = {}
    for i, (gain, reader) in enumerate(_paired(f"{one.norm}/scale", one.readers, arrays)):
        bias = _beside(gain, "bias")
        norm = Norm(arrays[gain], arrays.get(bias), (arrays[reader],))
        size = norm.gain.shape[0]
        if one.channels > size:
            raise ValueError(f"channels is {one.channels}, but {gain} has {size}")
        channels = jax.random.permutation(jax.random.fold_in(key, i), size)[: one.channels]
        norm = inject_norm_outliers(norm, channels, one.factor)
        new |= {gain: norm.gain, reader: norm.kernels[0]} | ({} if norm.bias is None else {bias: norm.bias})
    return new


def _beside(path: str, name: str) -> str:
    """Returns the path of another parameter of the same module."""
    module = path.rpartition("/")[0]
    return f"{module}/{name}" if module else name


def _paired(first: str, second: str, arrays: Named) -> list[tuple[str, str]]:
    """Returns what two patterns match, in pairs: as many each, in the same order."""
    pairs = _matching(first, arrays), _matching(second, arrays)
    if len(pairs[0]) != len(pairs[1]):
        raise ValueError(f"'{first}' matches {len(pairs[0])} parameters, '{second}' {len(pairs[1])}: not pairs")
    return list(zip(*pairs, strict=True))


def _matching(pattern: str, arrays: Iterable[str]) -> list[str]:
    """Returns the paths that match a pattern, sorted."""
    found = sorted(name for name in arrays if glob_matches(pattern, name))
    if not found:
        raise ValueError(f"'{pattern}' matches no parameter; there are {', '.join(sorted(arrays))}")
    return found
