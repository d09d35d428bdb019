"""What a run is: dataclass defaults < recipe YAML < command line, resolved and checked before any weight loads."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import TypeAdapter, ValidationError
from yaml import YAMLError

import fewstep.objectives
from fewstep.objectives.base import METHODS, Objective
from fewstep.registry import nearest
from fewstep.teachers.base import TEACHERS
from fewstep.training.options import TrainConfig

for _found in pkgutil.iter_modules(fewstep.objectives.__path__, "fewstep.objectives."):
    importlib.import_module(_found.name)  # a method's file registers it

SECTIONS = ("teacher", "method", "train", "prompts", "negative_prompt", "data", "pairs", "student")

TEXTS = {
    "prompts": "the path of a text file, one prompt a line, or of .jsonl, .parquet or .tar",
    "negative_prompt": "a text",
    "data": "the path of a folder of captioned pictures, or of .tar shards of them",
    "pairs": "the path of a folder that `fewstep pairs` wrote",
    "student": "the path of a run's folder",
}
"""Settings that are one text each."""

MAY_CHANGE = (
    *("iterations", "device", "prompt_cache", "offload_teacher"),
    *("log_every", "evaluate_every", "checkpoint_every", "keep", "tensorboard", "trackers"),
)
"""Fields of `train` that a resumed run may set anew; anything else would make it another run."""


@dataclass(frozen=True)
class RunConfig:
    """A resolved run.

    teacher: its name, folder or hub id.  teacher_options: arguments of its factory.  method, objective: the method's
    registered name and its checked options.  prompts: a prompt file, or None for the teacher's own prompts.
    negative_prompt: what guidance moves away from, or None for the empty prompt.
    data: captioned pictures, a folder or tar shards, for methods that need real samples, or None for the teacher's own.
    pairs: a folder of the teacher's ODE pairs, for methods that need them.
    student: a run from whose student the generator starts, or None for the teacher's weights.
    recipe: the recipe file that was used, if any.
    """

    teacher: str
    teacher_options: Mapping[str, Any]
    method: str
    objective: Objective
    train: TrainConfig
    prompts: str | None = None
    negative_prompt: str | None = None
    data: str | None = None
    pairs: str | None = None
    student: str | None = None
    recipe: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The layers of `resolve` that give this configuration again, as plain numbers, strings and lists."""
        return {
            "teacher": {"name": self.teacher, **self.teacher_options},
            "method": {"name": self.method, **_plain(self.objective)},
            "train": _plain(self.train),
            "prompts": self.prompts,
            "negative_prompt": self.negative_prompt,
            "data": self.data,
            "pairs": self.pairs,
            "student": self.student,
        }

    def defaults(self) -> dict[str, Any]:
        """Those settings of method and training that have a default, at it."""
        return {"method": _defaults(type(self.objective)), "train": _defaults(TrainConfig)}

    def to_yaml(self) -> str:
        """`to_dict` as YAML."""
        return OmegaConf.to_yaml(OmegaConf.create(self.to_dict()))


def resolve(
    *, config: str | Path | None = None, given: Mapping[str, Any] | None = None, sets: Sequence[str] = ()
) -> RunConfig:
    """Layer recipe, given values and --set assignments, and check every name and value.

    config: a YAML file (a recipe, or a run's config.yaml); by default the packaged recipe of teacher and method.
    given: nested mapping, as {"teacher": {"name": ...}, "train": {"lr": ...}}.  sets: "section.name=value".
    Raises ValueError or LookupError that names the value, what is allowed and the remedy.
    """
    explicit = _merge(given or {}, _assignments(sets))
    named = _merge(read_yaml(Path(config)), explicit) if config is not None else explicit
    teacher, method = _name(named, "teacher"), _name(named, "method")
    recipe = Path(config) if config is not None else recipe_of(teacher, method)
    layers = _merge(read_yaml(recipe), explicit) if recipe is not None else explicit
    _known(layers, SECTIONS, "")
    texts = {name: layers.get(name) for name in TEXTS}
    for name, value in texts.items():
        if not isinstance(value, str | None):
            raise ValueError(f"{name} = {value!r}: it must be {TEXTS[name]}")
    objective_type = METHODS.get(method)
    options = {k: v for k, v in layers.get("method", {}).items() if k != "name"}
    return RunConfig(
        teacher=teacher,
        teacher_options={k: v for k, v in layers["teacher"].items() if k != "name"},
        method=method,
        objective=build(objective_type, options, "method"),
        train=build(TrainConfig, layers.get("train", {}), "train"),
        **texts,
        recipe=str(recipe) if recipe is not None else None,
    )


def recipe_of(teacher: str, method: str) -> Path | None:
    """The packaged recipe configs/<teacher>_<method>.yaml of a registered teacher, if there is one."""
    if teacher not in TEACHERS:  # somebody's folder or hub id may end in the same word
        return None
    name = f"{teacher}_{method}.yaml".replace("-", "_")
    here = Path(__file__).parent
    for folder in (here / "configs", here.parent / "configs"):  # in a wheel, in a checkout
        if (folder / name).is_file():
            return folder / name
    return None


def build(cls: type, values: Mapping[str, Any], where: str) -> Any:
    """An instance of a dataclass from nested mappings; unknown keys and wrong types are errors.

    Raises ValueError naming the key as the user wrote it (`where`.key).
    """
    _check_keys(cls, values, where)
    try:
        return TypeAdapter(cls).validate_python(dict(values))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join([where, *(str(part) for part in first["loc"])])
        reason = str(first["msg"]).removeprefix("Value error, ")
        raise ValueError(f"{key} = {first['input']!r}: {reason}" if first["loc"] else f"{where}: {reason}") from error


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping.  Raises FileNotFoundError or ValueError."""
    if not path.is_file():
        raise FileNotFoundError(f"no configuration file at {path}")
    try:
        loaded = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(loaded, dict):
        raise ValueError(f"{path} must hold a mapping with the sections {', '.join(SECTIONS)}")
    return {str(k): v for k, v in loaded.items()}


def differences(old: Mapping[str, Any], new: Mapping[str, Any], defaults: Mapping[str, Any] | None = None) -> list[str]:
    """The keys of two `RunConfig.to_dict`s that a resume must not change, as "key: old -> new".

    defaults: what stands for settings that the old one lacks, as one of an earlier version does.
    """
    flat_old, flat_new = _flat(defaults or {}) | _flat(old), _flat(new)
    # Files may move: the checkpoint holds a digest of prompts and real samples, and a change of those is refused there;
    # another run's student was only where this one began.
    allowed = {"prompts", "data", "pairs", "student", *(f"train.{name}" for name in MAY_CHANGE)}
    keys = sorted((flat_old.keys() | flat_new.keys()) - allowed)
    return [f"{k}: {flat_old.get(k)} -> {flat_new.get(k)}" for k in keys if flat_old.get(k) != flat_new.get(k)]


def _name(layers: Mapping[str, Any], section: str) -> str:
    value = layers.get(section)
    name = value.get("name") if isinstance(value, Mapping) else None
    if not name:
        raise ValueError(f"no {section} named; give --{section} NAME, or {section}.name in the configuration file")
    return str(name)


def _assignments(sets: Sequence[str]) -> dict[str, Any]:
    for item in sets:
        if "=" not in item or item.startswith("="):
            raise ValueError(f"--set {item!r}: write section.name=value, as train.batch_size=32")
    try:
        made = OmegaConf.to_container(OmegaConf.from_dotlist(list(sets)))
    except (YAMLError, OmegaConfBaseException) as error:
        raise ValueError(f"--set {' '.join(sets)}: {error}") from error
    return made if isinstance(made, dict) else {}  # type: ignore[return-value]


def _merge(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Later layers win, mapping by mapping."""
    try:
        return OmegaConf.to_container(OmegaConf.merge(*(OmegaConf.create(dict(layer)) for layer in layers)))  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise ValueError(f"the configuration does not fit together: {error}") from error


def _check_keys(cls: type, values: Any, where: str) -> None:
    fields = {f.name: f for f in dataclasses.fields(cls)}
    if not isinstance(values, Mapping):
        raise ValueError(f"{where} must hold named values ({', '.join(fields)}), got {values!r}")
    _known(values, tuple(fields), where)
    for name, value in values.items():
        default = fields[name].default
        if dataclasses.is_dataclass(default) and not dataclasses.is_dataclass(value):
            _check_keys(type(default), value, f"{where}.{name}")


def _known(values: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    prefix = f"{where}." if where else ""
    for name in values:
        if name not in known:
            hint = nearest(str(name), list(known))
            raise LookupError(f"no setting {prefix}{name}.{hint} Known: {', '.join(prefix + k for k in known)}.")


def _plain(value: Any) -> Any:
    """A dataclass as nested dicts, tuples as lists."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return list(value) if isinstance(value, tuple) else value


def _defaults(cls: type) -> dict[str, Any]:
    found = {f.name: f.default for f in dataclasses.fields(cls)}
    return {name: _plain(value) for name, value in found.items() if value is not dataclasses.MISSING}


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {prefix: value}
    return {
        k: v for name, inner in value.items() for k, v in _flat(inner, f"{prefix}.{name}" if prefix else name).items()
    }
