"""From a file or a mapping to an experiment: presets, `--set` and seeds, and every mistake on one line."""

import importlib
import shlex
import sys
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from precision_lab.runner.axes import from_option, swept_by, values_tree, with_axis
from precision_lab.runner.config import ExperimentConfig
from precision_lab.runner.expansion import expand
from precision_lab.runner.explain import LocatedError, validate
from precision_lab.runner.resolve import BASE_KEYS, prune
from precision_lab.runner.tree import Tree, from_file, from_python, from_setting, merge, suggestion
from precision_lab.runner.yaml12 import Keys

Source = str | Path | Mapping[str, Any] | ExperimentConfig
EXPERIMENTS = Path("experiments")


def load(
    source: Source,
    *,
    presets: Sequence[str] = (),
    settings: Sequence[str] | Mapping[str, Any] = (),
    axes: Sequence[str] | Mapping[str, Sequence[Any]] = (),
    arms: Sequence[str] = (),
    seeds: Sequence[int] = (),
    imports: Sequence[str] = (),
) -> ExperimentConfig:
    """Returns the validated experiment.

    Args:
      source: a config file, a folder with a `config.yaml`, the name of a folder of `experiments/`, a mapping with
        the same keys, or an experiment.
      presets: names from the file's `presets`, merged over it in this order.
      settings: `key=value` texts as after `--set`, or a mapping from dotted key to value; merged last.
      axes: `key=value,value` texts as after `--axis`, or a mapping from dotted key to values: each multiplies all
        arms, as an entry of the file's `sweep` does, and takes the place of one over the same key.
      arms: keep only these, and with several of them the baseline.
      seeds: use these instead of the file's.
      imports: modules to import first, which register models or data of the user's own.

    Raises:
      LocatedError: a ValueError of one line: file, line, dotted path, what is wrong, and the nearest right word.
    """
    for module in imports:
        import_module_of_user(module)
    path = None if isinstance(source, Mapping | ExperimentConfig) else find_config(source)
    if isinstance(source, ExperimentConfig):
        if not (presets or settings or axes or arms or seeds):
            return _not_too_many(source)
        source = source.to_dict()
    tree = from_file(path) if path else from_python(source)
    known = tree.data.get("presets") or {}
    _refuse_broken_presets(tree, known)
    for name in presets:
        tree = merge(tree, _preset(tree, known, name))
    tree = _without_presets(tree)
    texts = _setting_texts(settings)
    for text in texts:
        tree = _apply_setting(tree, text)
    for key, values in _axis_values(axes):
        tree = with_axis(tree, key, values)
    experiment = _validate(tree)
    if arms or seeds:
        experiment = experiment.select(arms=arms, seeds=seeds)
    return _not_too_many(experiment)._with_words(_words(path, presets, texts, axes, arms, seeds, imports))


def _axis_values(axes: Sequence[str] | Mapping[str, Sequence[Any]]) -> list[tuple[str, Tree]]:
    """Returns the key and the values of each axis: texts from the command line, a mapping from Python."""
    if isinstance(axes, str):
        raise TypeError(f"axes is a list of 'key=value,value' texts or a mapping, got the text {axes!r}.")
    if isinstance(axes, Mapping):
        return [(key, values_tree(key, values, "")) for key, values in axes.items()]
    return [from_option(text) for text in axes]


def _not_too_many(experiment: ExperimentConfig) -> ExperimentConfig:
    """Returns the experiment.

    Raises:
      LocatedError: it has more runs than its `max_trials`.
    """
    limit = experiment.max_trials
    if limit is not None and experiment.size() > limit:
        size = f"{experiment.size()} runs ({len(experiment.arms)} arms, {len(experiment.seeds)} seeds)"
        way_out = "raise it, exclude combinations, or choose some by --arm and --seeds"
        raise LocatedError(f"{experiment.name}: {size}, and max_trials is {limit}; {way_out}.")
    return experiment


def import_module_of_user(name: str) -> None:
    """Imports a module that registers models or data, from the working directory too.

    Raises:
      LocatedError: there is no such module; an error inside it is raised as it is.
    """
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name == error.name or name.startswith(error.name + ".")):
            raise
        raise LocatedError(f"--import {name}: no module {error.name!r} here or installed.") from None


def find_config(target: str | Path) -> Path:
    """Returns the config file that a target names: a file, a folder, or the name of an experiment.

    Raises:
      LocatedError: there is no such thing; names the nearest experiment.
    """
    for path in (Path(target), EXPERIMENTS / target):
        for name in ("config.yaml", "experiment.yaml"):
            if (path / name).is_file():
                return path / name
        if path.is_file():
            return path
        if path.is_dir():
            raise LocatedError(f"{path} has no config.yaml, so it is not an experiment.")
    near = _nearest_experiment(str(target))
    raise LocatedError(f"no config file or experiment folder {str(target)!r}{near}")


def _nearest_experiment(target: str) -> str:
    """Returns a suggestion among the folders of `experiments/`, and of the folder the target lies in."""
    folders = {str(path.parent): path.parent.name for path in EXPERIMENTS.glob("*/config.yaml")}
    folders |= {str(path.parent): path.parent.name for path in Path(target).parent.glob("*/config.yaml")}
    near = get_close_matches(Path(target).name, sorted(set(folders.values())), n=1, cutoff=0.5)
    found = next((path for path, name in sorted(folders.items()) if near and name == near[0]), None)
    if found:
        return f"; did you mean {found!r}?"
    return f"; experiments here: {', '.join(sorted(folders))}." if folders else "."


def _validate(tree: Tree) -> ExperimentConfig:
    """Returns the experiment that a whole tree describes."""
    tree = prune(expand(tree))
    base = {key: value for key, value in tree.data.items() if key in BASE_KEYS}
    rest = Tree({key: value for key, value in tree.data.items() if key not in BASE_KEYS}, tree.places)
    if "base" in rest.data:
        raise LocatedError(tree.place(("base",)).say("unknown key; write model, data, ... at the top level."))
    checked = Tree({**rest.data, "base": base}, tree.places)
    return validate(ExperimentConfig, checked, context={"places": tree.places})


def _without_presets(tree: Tree) -> Tree:
    """Returns the tree without its presets, which have been applied or not asked for."""
    return tree.without([("presets",)]) if "presets" in tree.data else tree


def _preset(tree: Tree, known: Mapping[str, Any], name: str) -> Tree:
    """Returns one preset as a tree."""
    if name not in known:
        where = tree.place(())
        text = suggestion(name, known, what="presets") if known else "; the experiment has no presets."
        raise LocatedError(f"{where}: no preset {name!r}{text}" if str(where) else f"no preset {name!r}{text}")
    preset = tree.at("presets", name)
    return Tree({}, {}) if preset.data is None else preset


def _refuse_broken_presets(tree: Tree, known: Any) -> None:
    """Raises if any preset, asked for or not, is no valid experiment: a full-size run is a bad time to learn it."""
    place = tree.place(("presets",))
    if not isinstance(known, Mapping):
        raise LocatedError(place.say(f"presets are mappings by name, got {known!r}."))
    for name in known:
        preset = _preset(tree, known, name)
        if not isinstance(preset.data, Mapping):
            raise LocatedError(preset.place(()).say("a preset is a mapping of what it changes."))
        for key in ("name", "presets"):
            if key in preset.data:
                raise LocatedError(preset.place((key,)).say(f"a preset cannot change {key!r}."))
        _validate(_without_presets(merge(tree, preset)))


def _setting_texts(settings: Sequence[str] | Mapping[str, Any]) -> list[str | tuple[str, Any]]:
    """Returns settings one by one: texts from the command line, pairs from Python."""
    if isinstance(settings, str):
        raise TypeError(f"settings is a list of 'key=value' texts or a mapping, got the text {settings!r}.")
    return list(settings.items()) if isinstance(settings, Mapping) else list(settings)


def _apply_setting(tree: Tree, setting: str | tuple[str, Any]) -> Tree:
    """Returns the tree with one setting, refusing one that could not take effect."""
    if isinstance(setting, str):
        keys, override = from_setting(setting)
    else:
        keys = tuple(setting[0].split("."))
        data = setting[1]
        for key in reversed(keys):
            data = {key: data}
        override = from_python(data)
    _refuse_without_effect(tree, keys)
    return merge(tree, override)


def _refuse_without_effect(tree: Tree, keys: Keys) -> None:
    """Raises for an arm that does not exist, and for a shared key that every arm overrides."""
    name, arms = ".".join(map(str, keys)), tree.data.get("arms") or {}
    if keys[:1] == ("arms",) and len(keys) > 1 and keys[1] not in arms:
        text = suggestion(str(keys[1]), arms, what="arms")
        raise LocatedError(f"--set {name}: no arm {keys[1]!r}{text}")
    if axis := swept_by(tree, name):
        raise LocatedError(f"--set {name} would change nothing: the axis {axis!r} sets it; use --axis {name}=...")
    if next(iter(keys)) in BASE_KEYS and arms and all(_sets(arm, keys) for arm in arms.values()):
        first = next(iter(arms))
        raise LocatedError(f"--set {name} would change nothing: every arm sets it; use --set arms.{first}.{name}=...")


def _sets(arm: Any, keys: Keys) -> bool:
    """Returns whether an arm itself sets a key, or something around it by a plain value."""
    for key in keys:
        if not isinstance(arm, Mapping):
            return arm is not None
        if key not in arm:
            return False
        arm = arm[key]
    return True


def _words(
    path: Path | None,
    presets: Sequence[str],
    settings: Sequence[str | tuple[str, Any]],
    axes: Sequence[str] | Mapping[str, Sequence[Any]],
    arms: Sequence[str],
    seeds: Sequence[int],
    imports: Sequence[str],
) -> tuple[str, ...]:
    """Returns what to write after `precision-lab run`, empty for what only Python knows."""
    if path is None or isinstance(axes, Mapping) or any(not isinstance(setting, str) for setting in settings):
        return ()
    target = path.parent if path.name == "config.yaml" else path
    words = [shlex.quote(str(target))]
    words += [word for module in imports for word in ("--import", module)]
    words += [word for name in presets for word in ("--preset", name)]
    words += [word for text in settings for word in ("--set", shlex.quote(str(text)))]
    words += [word for text in axes for word in ("--axis", shlex.quote(text))]
    words += [word for seed in seeds for word in ("--seed", str(seed))]
    return (*words, *(word for arm in arms for word in ("--arm", shlex.quote(arm))))
