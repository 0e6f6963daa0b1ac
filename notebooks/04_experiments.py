# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Running and reading an experiment
#
# An experiment is data: a base run, arms that each change something, seeds, and claims that a machine can judge. The
# same keys make a YAML file, which `precision-lab run` takes, and a dictionary, which this notebook takes. The
# question here: how few bits do the weights of a small network need, if it trains with them from the start?

# %%
import tempfile

import precision_lab as pl
from precision_lab.runner.groups import describe, groups

folder = tempfile.mkdtemp()
experiment = pl.load(
    {
        "name": "few_bits",
        "model": {"kind": "mlp", "hidden": [64, 64]},
        "data": {"kind": "digits", "batch": 64},
        "optim": {"kind": "adam", "lr": 3e-3, "schedule": {"kind": "cosine"}},
        "train": {"steps": 200, "eval_every": 40},
        "arms": {
            "float32": {},
            "int8": {"policy": "weight=int8@channel"},
            "int4": {"policy": "weight=int4@channel"},
            "int3": {"policy": "weight=int3@channel"},
            "int2": {"policy": "weight=int2@channel"},
        },
        "seeds": [0, 1, 2],
        "claims": [
            {"kind": "close", "a": "int8", "b": "float32", "metric": "eval_train/loss", "margin": 0.01},
            {"kind": "gt", "a": "int2", "b": "int4", "metric": "eval_train/loss", "margin": 0.05},
            {"kind": "monotone", "arms": ["int8", "int4", "int3", "int2"], "metric": "eval_train/loss", "tol": 0.002},
        ],
    }
)
print(f"{len(experiment.arms)} arms, {experiment.size()} runs")

# %% [markdown]
# Arms that differ in numbers alone (bit widths, learning rates, seeds) share one compiled program. `groups` says which
# do, and why the others do not; `precision-lab check` prints the same.

# %%
print(describe(groups(experiment)))

# %% [markdown]
# ## Running
#
# Every arm of a seed starts from the same weights and sees the same batches in the same order, so differences are
# taken seed by seed. Each run has a directory that is named by what it is. What is finished is never run again:
# executing this cell twice trains nothing the second time, and a run that was killed goes on where it was.

# %%
results = pl.run(experiment, out=folder, say=str)
results.table()

# %% [markdown]
# The table shows means over the seeds with 95 % intervals, and the difference to the first arm. Each claim got a
# verdict: `reproduced`, `not_reproduced`, or `inconclusive` where a run is missing or crashed. A claim is never passed
# by default.

# %%
for verdict in results.verdicts:
    print(f"{verdict.verdict}: {verdict.say}")

# %% [markdown]
# ## Looking
#
# Learning curves show the median over seeds and the band from the smallest to the largest. The second picture is what
# one wants to know in the end: bits per weight, scales included, against quality. What nothing beats on both counts is
# marked.

# %%
results.plot("eval/loss")

# %%
results.pareto("eval/loss")

# %% [markdown]
# Every number is at hand: by trial, as plain dictionaries, or as pandas frames (`results.frame()` has one row per run,
# `results.metrics_frame()` one per run and step).

# %%
trial = results.trial("int2", 0)
print(trial.arm, trial.state, sorted(trial.series)[:4])

# %% [markdown]
# ## Asking one more question
#
# `axis` multiplies an experiment by a list of values, and more seeds are one word. Only what is new runs.

# %%
wider = experiment.axis("model.hidden", [[64, 64], [128, 128]]).with_seeds(1)
print(f"{len(wider.arms)} arms, such as {list(wider.arms)[-1]}")

# %% [markdown]
# The same from a shell, with the experiment in a file:
#
# ```
# precision-lab check few_bits.yaml                      # what would run, and in how many programs
# precision-lab run few_bits.yaml                        # runs, judges, writes report.html
# precision-lab run few_bits.yaml --axis optim.lr=1e-3,3e-3 --seeds 0..4
# precision-lab ls --where "state = 'done'"              # all runs there are
# precision-lab diff RUN_A RUN_B                         # what is different about them, in words
# ```
#
# `results.report("report.html")` writes the page that `run` writes: one file with everything above, the verdicts
# beside the paper's numbers, what is inside the tensors, and the command that makes each row again.
