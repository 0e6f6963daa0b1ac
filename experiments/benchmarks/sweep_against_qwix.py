"""A sweep of 32 quantized runs beside the same runs through Qwix, arm by arm and step for step.

    PRECISION_LAB_DATA=DIR python experiments/benchmarks/sweep_against_qwix.py --write experiments/benchmarks/results

Both sides train the same small transformer from the same bits on the same batches with the same AdamW, log the loss
equally often, and evaluate the same examples before and after. Ours is `training.train`, whose arms share one program;
Qwix is used as its documentation does: quantize the model, jit a step, compile, train. Sides take turns arm by arm,
since the machine may do other work: each ratio is of sums over all arms. CPU seconds are those of the whole process.

Two rows: the sweep, and tracing and compiling alone for seven weight widths, beside one width.
"""

import argparse
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import qwix
from flax import nnx

from precision_lab import data, models
from precision_lab.bench.interleaved import environment
from precision_lab.bench.report import write
from precision_lab.training.config import RunConfig
from precision_lab.training.loop import train
from precision_lab.training.numbers import hyper
from precision_lab.training.program import cross_entropy, program_for

PACKAGES = ("jax", "jaxlib", "numpy", "flax", "optax", "qwix")
TARGETS = {"sweep": 0.5, "widths": 1.2}


@dataclass
class Spent:
    """What one side has spent, and what its runs ended with."""

    wall_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def on(self, run: Callable[[], float]) -> None:
        """Runs something that returns a loss, and adds what that takes."""
        wall, cpu = time.perf_counter(), time.process_time()
        self.losses.append(run())
        self.wall_s.append(time.perf_counter() - wall)
        self.cpu_s.append(time.process_time() - cpu)


class Rows:
    """Keeps the latest metrics."""

    def restart(self, step: int) -> None:
        """Has nothing to drop."""

    def write(self, row: Any) -> None:
        """Has nowhere to write."""


def config(bits: int, lr: float, seed: int, args: argparse.Namespace) -> RunConfig:
    """Returns one run of the sweep."""
    return RunConfig.model_validate(
        {
            "model": {"kind": "transformer", "depth": args.depth, "width": args.width, "heads": 4},
            "data": {"kind": "tinyshakespeare", "seq_len": args.length, "batch": args.batch},
            "optim": {"kind": "adamw", "lr": lr},
            "train": {"steps": args.steps, "log_every": 25, "eval_examples": args.eval_examples},
            "policy": f"weight=int{bits}@channel",
            "seed": seed,
        }
    )


def ours(one: RunConfig) -> float:
    """Returns the final loss on held-out text of a run as precision_lab makes it."""
    return train(one, checkpoint_dir=None, sink=Rows()).metrics["eval/loss"]


def through_qwix(one: RunConfig) -> float:
    """Returns the same of a run as a user of Qwix would write it."""
    dataset = data.load(one.data)
    batches = data.batches(dataset, one.data, one.seed)
    graphdef, params, rest = nnx.split(_qwix_model(one, dataset.spec), nnx.Param, ...)
    optimizer = optax.adamw(one.optim.lr, weight_decay=one.optim.weight_decay)
    step, evaluate = _qwix_step(graphdef, optimizer), _qwix_evaluation(graphdef)
    state = params, optimizer.init(params)
    held_out = partial(_mean_loss, evaluate, rest, one)
    for split in (dataset.eval, dataset.eval_train):
        held_out(params, split)
    for number in range(one.train.steps):
        state, loss = step(state, rest, batches[number])
        if (number + 1) % one.train.log_every == 0:
            loss.item()
    final, _ = [held_out(state[0], split) for split in (dataset.eval, dataset.eval_train)]
    return final


def _qwix_model(one: RunConfig, spec: Any) -> nnx.Module:
    """Returns the model with the weights of its linear layers under Qwix."""
    name = one.policy.partition("weight=")[2].partition("@")[0]
    provider = qwix.QtProvider([qwix.QtRule(op_names=("dot_general",), weight_qtype=name)])
    model = models.build(one.model, spec, one.seed)
    return qwix.quantize_model(model, provider, None, skip_nnx_init=True)


def _qwix_step(graphdef: Any, optimizer: Any) -> Any:
    """Returns the jitted step of one run."""

    def step(state: Any, rest: Any, batch: Any) -> Any:
        params, opt_state = state

        def loss_of(params: Any) -> jax.Array:
            logits = nnx.merge(graphdef, params, rest)(batch["inputs"])
            return jnp.mean(cross_entropy(logits, batch["targets"]))

        loss, grads = jax.value_and_grad(loss_of)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), loss

    return jax.jit(step, donate_argnums=0)


def _qwix_evaluation(graphdef: Any) -> Any:
    """Returns the jitted loss of one batch."""

    def evaluate(params: Any, rest: Any, batch: Any) -> jax.Array:
        logits = nnx.merge(graphdef, params, rest)(batch["inputs"])
        return jnp.sum(jnp.mean(cross_entropy(logits, batch["targets"]), axis=-1))

    return jax.jit(evaluate)


def _mean_loss(evaluate: Any, rest: Any, one: RunConfig, params: Any, split: Any) -> float:
    """Returns the mean loss over the examples that an evaluation uses."""
    size, batch = one.train.eval_examples, one.data.batch
    assert size % batch == 0, "so that no side pads"
    sums = [evaluate(params, rest, split.take(np.arange(i, i + batch))) for i in range(0, size, batch)]
    return sum(one.item() for one in sums) / size


def sweep(args: argparse.Namespace) -> dict[str, Any]:
    """Returns what the sweep takes on both sides."""
    grid = list(product(args.bits, args.lrs, range(args.seeds)))
    sides = {"ours": (ours, Spent()), "qwix": (through_qwix, Spent())}
    jax.clear_caches()
    for number, (bits, lr, seed) in enumerate(grid):
        for run, spent in list(sides.values())[:: 1 if number % 2 else -1]:
            spent.on(partial(run, config(bits, lr, seed, args)))
        told = {name: f"{spent.wall_s[-1]:.1f} s, loss {spent.losses[-1]:.3f}" for name, (_, spent) in sides.items()}
        print(f"{number + 1}/{len(grid)} int{bits} lr {lr:g} seed {seed}: {told}", flush=True)
    arms = [{"bits": bits, "lr": lr, "seed": seed} for bits, lr, seed in grid]
    return _row("sweep", {name: spent for name, (_, spent) in sides.items()}) | {"arms": arms}


def widths(args: argparse.Namespace) -> dict[str, Any]:
    """Returns what tracing and compiling a step takes for seven widths, and for the first of them, on both sides."""
    configs = [config(bits, 1e-3, 0, args) for bits in range(8, 1, -1)]
    sides = {"ours": (_our_executable, Spent()), "qwix": (_qwix_executable, Spent())}
    for one in configs:
        for prepared, spent in sides.values():
            spent.on(prepared(one))
        print(f"{one.policy}: {sides['ours'][1].wall_s[-1]:.2f} s, {sides['qwix'][1].wall_s[-1]:.2f} s", flush=True)
    return _row("widths", {name: spent for name, (_, spent) in sides.items()})


def _our_executable(one: RunConfig) -> Callable[[], float]:
    """Returns what takes one step of a run, which compiles it if it is not yet; its state is made beforehand."""
    dataset = data.load(one.data)
    program, numbers = program_for(one, dataset.spec), hyper(one)
    batch = data.batches(dataset, one.data, one.seed)[0]
    state = program.init(one.seed, numbers)
    return lambda: program.step(state, batch, numbers)[1]["loss"].item()


def _qwix_executable(one: RunConfig) -> Callable[[], float]:
    """Returns the same through Qwix."""
    dataset = data.load(one.data)
    graphdef, params, rest = nnx.split(_qwix_model(one, dataset.spec), nnx.Param, ...)
    optimizer = optax.adamw(one.optim.lr, weight_decay=one.optim.weight_decay)
    batch = data.batches(dataset, one.data, one.seed)[0]
    step, state = _qwix_step(graphdef, optimizer), (params, optimizer.init(params))
    return lambda: step(state, rest, batch)[1].item()


def _row(name: str, spent: dict[str, Spent]) -> dict[str, Any]:
    """Returns a row: times of each arm, in order, and what was asked of them."""
    times = {f"{side}_{what}": [round(s, 3) for s in getattr(one, what)] for side, one in spent.items()
             for what in ("wall_s", "cpu_s")}  # fmt: skip
    losses = {f"{side}_losses": one.losses for side, one in spent.items()}
    return {"row": name, **times, **losses}


def report(found: dict[str, Any]) -> Iterator[str]:
    """Yields the lines of the Markdown twin."""
    run = found["settings"]
    yield "# A sweep that compiles once, beside Qwix arm by arm\n"
    yield (
        f"Transformer of depth {run['depth']}, width {run['width']}; batch {run['batch']} of {run['length']} "
        f"characters of tinyshakespeare; {run['steps']} steps of AdamW; {run['eval_examples']} examples of each split "
        "evaluated before and after. Weights as integers, one scale for each output channel. Same initialisation, "
        "batches, optimizer and logging on both sides; ours also computes norms, shares of zeros and skipped steps. "
        "Sides take turns arm by arm; wall seconds are of a machine that does other work too, CPU seconds are this "
        "process's.\n"
    )
    yield f"{found['device']}, {found['cores']} cores; {', '.join(f'{k} {v}' for k, v in found['versions'].items())}."
    yield "Written by `python experiments/benchmarks/sweep_against_qwix.py --write DIRECTORY`.\n"
    yield "| what | precision_lab | Qwix | ratio | target |"
    yield "| --- | ---: | ---: | ---: | ---: |"
    for row in found["rows"]:
        yield from _lines(row)


def _lines(row: dict[str, Any]) -> Iterable[str]:
    """Yields the lines of one row."""
    for what, unit in (("wall_s", "s"), ("cpu_s", "CPU s")):
        mine, theirs = row[f"ours_{what}"], row[f"qwix_{what}"]
        if row["row"] == "sweep":
            count, ratio = len(mine), sum(mine) / sum(theirs)
            yield _line(f"sweep of {count} runs, {unit}", sum(mine), sum(theirs), ratio, TARGETS["sweep"])
            later = sum(mine[1:]) / sum(theirs[1:])
            yield f"| of these a run after the first, {unit} | {sum(mine[1:]) / (count - 1):.2f} | " + (
                f"{sum(theirs[1:]) / (count - 1):.2f} | {later:.2f} |  |"
            )
        else:
            name = f"tracing and compiling a step for {len(mine)} widths, {unit}"
            ratio, other = sum(mine) / mine[0], sum(theirs) / theirs[0]
            yield f"| {name} | {sum(mine):.2f} | {sum(theirs):.2f} | {sum(mine) / sum(theirs):.2f} |  |"
            met = "" if ratio <= TARGETS["widths"] else " (missed)"
            yield f"| the same over one width | {ratio:.2f} | {other:.2f} |  | <= {TARGETS['widths']}{met} |"


def _line(name: str, mine: float, theirs: float, ratio: float, target: float) -> str:
    met = "" if ratio <= target else " (missed)"
    return f"| {name} | {mine:.1f} | {theirs:.1f} | {ratio:.2f} | <= {target}{met} |"


def main() -> None:
    """Runs both rows and writes what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"depth": 2, "width": 64, "length": 64, "batch": 16, "steps": 200, "eval-examples": 64, "seeds": 2}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4, 8])
    parser.add_argument("--lrs", type=float, nargs="+", default=[3e-4, 1e-3, 3e-3, 1e-2])
    parser.add_argument("--write", type=Path)
    args = parser.parse_args()
    data.load(config(8, 1e-3, 0, args).data)
    rows = [widths(args), sweep(args)]
    settings = {name: value for name, value in vars(args).items() if name != "write"}
    found = {"benchmark": "sweep", **environment(PACKAGES), "settings": settings, "targets": TARGETS, "rows": rows}
    text = "\n".join(report(found)) + "\n"
    print(text)
    if args.write:
        write(found, text, args.write)


if __name__ == "__main__":
    main()
