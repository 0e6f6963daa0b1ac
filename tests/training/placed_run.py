"""A run in a process of its own, whose flags say how many devices it has: `python placed_run.py CONFIG FOLDER STOP`.

It stops after STOP steps, if that is not 0, and prints what there is to say about the state it began with and about the
result.
"""

import hashlib
import json
import sys
from pathlib import Path

import jax
import numpy as np

from precision_lab.training import RunConfig, loop, train
from precision_lab.training.placement import Placement
from tests.training.runs import MemorySink


def main(config_json, folder, stop):
    seen = {}
    original = loop._Run.go

    def go(self, state, *args, **kwargs):
        params = jax.tree.leaves(state.params)
        moments = [x for x in jax.tree.leaves(state.opt_state) if x.ndim]
        seen["bytes"] = {name: bytes_of(leaves) for name, leaves in {"params": params, "moments": moments}.items()}
        seen["digest"] = hashlib.sha256(b"".join(np.asarray(x).tobytes() for x in [*params, *moments])).hexdigest()
        seen["start"] = int(state.step)
        return original(self, state, *args, **kwargs)

    def should_stop():
        calls.append(None)
        return len(calls) == int(stop)

    calls, sink = [], MemorySink()
    loop._Run.go = go
    config = RunConfig.model_validate_json(config_json)
    result = train(config, checkpoint_dir=Path(folder), sink=sink, should_stop=should_stop)
    losses = {row["step"]: row["loss"] for row in sink.rows if row["split"] == "train"}
    mesh = Placement(config).mesh
    shape = {} if mesh is None else dict(mesh.shape)
    print(json.dumps({**seen, "mesh": shape, "losses": losses, "result": [result.status, result.step, result.metrics]}))


def bytes_of(leaves):
    """Returns (bytes on the first device, bytes of the whole)."""
    return sum(x.addressable_shards[0].data.nbytes for x in leaves), sum(x.nbytes for x in leaves)


if __name__ == "__main__":
    main(*sys.argv[1:])
