"""Placement: where the state and the batches of a run are, on one device or on a mesh of many.

The program of a run is the same on any mesh. Here it is compiled with the placement of what goes in and comes out, and
XLA divides the work (GSPMD; Xu et al., arXiv:2105.04663). Batches are divided over `data` and `fsdp`; parameters, and
whatever in the optimizer's state has their shape, over `fsdp` (Zhao et al., "PyTorch FSDP", arXiv:2304.11277) and
`tensor` (Shoeybi et al., "Megatron-LM", arXiv:1909.08053, section 3: the first product of a block is divided along its
outputs, the second along its inputs). A run starts from the same bits on every mesh, because it is initialised on one
device and then divided.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from precision_lab.policy.patterns import glob_matches
from precision_lab.training.config import RunConfig
from precision_lab.training.mesh import AXES, MeshConfig
from precision_lab.training.program import Program
from precision_lab.training.state import TrainState

_BATCH = PartitionSpec(("data", "fsdp"))
_OUTPUTS = ("**/up/kernel", "**/query/kernel", "**/key/kernel", "**/value/kernel", "head/kernel", "**/layers/*/kernel")
_INPUTS = ("**/down/kernel", "**/out/kernel", "**/embedding")
_OUTPUT_BIASES = ("**/up/bias", "**/query/bias", "**/key/bias", "**/value/bias")


def make_mesh(config: MeshConfig) -> Mesh:
    """Returns the mesh of a run, over all processes.

    Raises:
      ValueError: there are not as many devices.
    """
    sizes, devices = [getattr(config, axis) for axis in AXES], jax.devices()
    known = math.prod(size for size in sizes if size > 0)
    if -1 in sizes:
        sizes[sizes.index(-1)] = len(devices) // known
    count = math.prod(sizes)
    if count == 0 or count > len(devices):
        raise ValueError(
            f"mesh {_words(config)} needs {max(known, count)} devices, but there are {len(devices)}; a size of -1 "
            "takes as many as there are."
        )
    if jax.process_count() > 1 and count != len(devices):
        raise ValueError(f"mesh {_words(config)} leaves {len(devices) - count} devices out, of several processes.")
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices[:count])


def check_placement(config: RunConfig) -> None:
    """Raises ValueError if there are too few devices for a run, or its batch cannot be divided among them."""
    if not config.mesh.is_one_device:
        Placement(config)


class Placement:
    """Where everything of one run is."""

    def __init__(self, config: RunConfig) -> None:
        """Makes the mesh.

        Raises:
          ValueError: there are too few devices, or the batch cannot be divided among them.
        """
        self._config = config.mesh
        self.mesh = None if config.mesh.is_one_device else make_mesh(config.mesh)
        self.parts = 1 if self.mesh is None else self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        if config.data.batch % self.parts:
            raise ValueError(
                f"data.batch is {config.data.batch}, which the mesh cannot divide by {self.parts} (data x fsdp)."
            )

    def rows(self, batch: int) -> int:
        """Returns how many rows to evaluate at once instead of `batch`, so that devices can share them."""
        return -(-batch // self.parts) * self.parts

    def program(self, program: Program) -> Program:
        """Returns a program whose state, and its shapes, have their places."""
        if self.mesh is None:
            return program
        shardings = self.shardings(program.state_shapes)
        everywhere, divided = self._named(PartitionSpec()), self._named(_BATCH)
        step = jax.jit(
            lambda state, batch, numbers: program.step(state, batch, numbers),
            in_shardings=(shardings, divided, everywhere),
            out_shardings=(shardings, everywhere),
            donate_argnums=0,
        )
        return program._replace(
            step=lambda state, batch, numbers: step(state, self._feed(batch), jax.tree.map(np.asarray, numbers)),
            evaluate=self.evaluator(program.evaluate, program.state_shapes),
            state_shapes=jax.tree.map(_placed, program.state_shapes, shardings),
        )

    def evaluator(self, evaluate: Any, shapes: TrainState) -> Any:
        """Returns a function such as `Program.evaluate` that takes a state in its place."""
        if self.mesh is None:
            return evaluate
        shardings, divided = self.shardings(shapes), self._named(_BATCH)
        placed = jax.jit(
            lambda state, batch, weights: evaluate(state, batch, weights),
            in_shardings=(shardings, divided, divided),
            out_shardings=self._named(PartitionSpec()),
        )
        return lambda state, batch, weights: placed(state, self._feed(batch), self._feed(weights))

    def place(self, state: TrainState) -> TrainState:
        """Returns a state that every process has whole, with each part where it belongs."""
        if self.mesh is None:
            return state
        return jax.tree.map(_put, jax.device_get(state), self.shardings(state))

    def shardings(self, state: TrainState) -> TrainState:
        """Returns where each array of a state, or of its shapes, belongs."""
        specs = {keys: self._spec(keys, x.shape) for keys, x in _leaves(state.params).items()}
        shapes = {keys: x.shape for keys, x in _leaves(state.params).items()}

        def like_its_parameter(keys: Any, x: Any) -> NamedSharding:
            names = _names(keys)
            own = next((names[i:] for i in range(len(names)) if shapes.get(names[i:]) == x.shape), None)
            return self._named(PartitionSpec() if own is None else specs[own])

        everywhere = jax.tree.map(lambda _: self._named(PartitionSpec()), state)
        return dataclasses.replace(
            everywhere,
            params=jax.tree_util.tree_map_with_path(like_its_parameter, state.params),
            opt_state=jax.tree_util.tree_map_with_path(like_its_parameter, state.opt_state),
        )

    def _spec(self, names: tuple[str, ...], shape: tuple[int, ...]) -> PartitionSpec:
        """Returns what divides the axes of a parameter: what its rule says as far as it goes, then `fsdp`."""
        assert self.mesh is not None
        path, written = "/".join(names), dict(self._config.sharding)
        own = next((axes for pattern, axes in written.items() if glob_matches(pattern, path)), None)
        if own is not None:
            _refuse_misfit(path, shape, own, self.mesh)
            return PartitionSpec(*own)
        axes = [
            axis if axis and shape[i] % self.mesh.shape[axis] == 0 else None
            for i, axis in enumerate(_tensor_axes(path, len(shape)))
        ]
        size = self.mesh.shape["fsdp"]
        free = [i for i, axis in enumerate(axes) if axis is None and shape[i] % size == 0]
        if size > 1 and free:
            axes[max(free, key=lambda i: shape[i])] = "fsdp"
        return PartitionSpec(*axes)

    def _named(self, spec: PartitionSpec) -> NamedSharding:
        assert self.mesh is not None
        return NamedSharding(self.mesh, spec)

    def _feed(self, batch: Any) -> Any:
        """Returns host arrays as arrays of the mesh; each process hands over the rows of its own devices alone."""
        return jax.tree.map(lambda x: _put(x, self._named(_BATCH)), batch)


def _put(x: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """Returns a host array, which every process has whole, divided."""
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


def _placed(x: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _tensor_axes(path: str, rank: int) -> list[str | None]:
    """Returns which axis of a parameter `tensor` divides, by the rules of the package."""
    axes: list[str | None] = [None] * rank
    if rank >= 2 and any(glob_matches(pattern, path) for pattern in _OUTPUTS):
        axes[-1] = "tensor"
    elif (rank >= 2 and any(glob_matches(pattern, path) for pattern in _INPUTS)) or (
        rank == 1 and any(glob_matches(pattern, path) for pattern in _OUTPUT_BIASES)
    ):
        axes[0] = "tensor"
    return axes


def _refuse_misfit(path: str, shape: tuple[int, ...], axes: tuple[str | None, ...], mesh: Mesh) -> None:
    """Raises ValueError if a rule of the config does not fit a parameter."""
    fits = len(axes) <= len(shape) and all(
        axis is None or size % mesh.shape[axis] == 0 for axis, size in zip(axes, shape, strict=False)
    )
    if not fits:
        raise ValueError(f"mesh.sharding: {list(axes)} does not divide {path} {shape} on {dict(mesh.shape)}.")


def _leaves(tree: Any) -> Mapping[tuple[str, ...], Any]:
    return {_names(keys): x for keys, x in jax.tree_util.tree_flatten_with_path(tree)[0]}


def _names(keys: Any) -> tuple[str, ...]:
    """Returns the keys of a path of a tree as text."""
    return tuple(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in keys)


def _words(config: MeshConfig) -> str:
    return ", ".join(f"{axis} {getattr(config, axis)}" for axis in AXES)
