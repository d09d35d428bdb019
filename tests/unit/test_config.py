"""Layers, names, types and differences of a run's configuration."""

from dataclasses import dataclass

import pytest

from fewstep.config import MAY_CHANGE, build, differences, read_yaml, recipe_of, resolve
from fewstep.objectives.base import Turns
from fewstep.training.options import TrainConfig

TOY = {"teacher": {"name": "gaussian"}, "method": {"name": "dmd2"}}


def test_defaults_are_the_dataclasses_own():
    assert resolve(given=TOY).train == TrainConfig()


def test_recipe_file_is_below_given_values_and_those_below_assignments(tmp_path):
    (tmp_path / "recipe.yaml").write_text("train: {seed: 1, iterations: 1, batch_size: 1}\n")
    given = {**TOY, "train": {"iterations": 2, "batch_size": 2}}
    made = resolve(config=tmp_path / "recipe.yaml", given=given, sets=["train.batch_size=3"]).train
    assert (made.seed, made.iterations, made.batch_size, made.accumulate) == (1, 2, 3, 1)


def test_layers_merge_key_by_key():
    """Fails if a later layer replaces a whole section: betas of the recipe would be lost beside a new lr."""
    given = {**TOY, "train": {"generator": {"lr": 1e-3, "betas": [0.0, 0.5]}}}
    made = resolve(given=given, sets=["train.generator.lr=2e-3"]).train.generator
    assert (made.lr, made.betas) == (2e-3, (0.0, 0.5))


def test_later_assignment_wins():
    assert resolve(given=TOY, sets=["train.seed=1", "train.seed=2"]).train.seed == 2


@pytest.mark.parametrize(("text", "value"), [("1e-4", 1e-4), ("1E-4", 1e-4), ("5", 5.0), (".5", 0.5)])
def test_numbers_are_numbers_in_files_and_in_assignments(tmp_path, text, value):
    """Fails with PyYAML's own loader, which reads 1e-4 as a string."""
    (tmp_path / "recipe.yaml").write_text(f"train: {{generator: {{lr: {text}}}}}\n")
    in_file = resolve(config=tmp_path / "recipe.yaml", given=TOY).train.generator.lr
    assigned = resolve(given=TOY, sets=[f"train.generator.lr={text}"]).train.generator.lr
    assert (in_file, assigned, type(in_file)) == (value, value, float)


def test_yaml_gives_the_same_run_again(tmp_path):
    given = {**TOY, "teacher": {"name": "mixture", "means": [[1.0, 2.0], [0.0, 0.5]]}, "prompts": "p.txt"}
    made = resolve(given=given, sets=["method.turns.critic_warmup=3", "train.generator.lr=3e-7", "train.ema=0.9"])
    (tmp_path / "config.yaml").write_text(made.to_yaml())
    again = resolve(config=tmp_path / "config.yaml")
    assert again.to_dict() == made.to_dict()
    assert again.objective == made.objective


@pytest.mark.parametrize(
    ("sets", "unknown", "hint"),
    [
        (["train.bach_size=2"], "train.bach_size", "'batch_size'"),
        (["train.critic.beta=1"], "train.critic.beta", "'betas'"),
        (["method.turns.critic_warm=1"], "method.turns.critic_warm", "'critic_warmup'"),
        (["methods.guidance=1"], "methods", "'method'"),
    ],
)
def test_unknown_key_names_the_nearest(sets, unknown, hint):
    with pytest.raises(LookupError, match="Did you mean") as caught:
        resolve(given=TOY, sets=sets)
    assert f"no setting {unknown}. Did you mean {hint}?" in str(caught.value)


def test_key_far_from_all_names_what_is_known():
    with pytest.raises(LookupError, match=r"no setting train\.zzz\. Known: train\.iterations, train\.batch_size"):
        resolve(given=TOY, sets=["train.zzz=1"])


def test_build_makes_nested_dataclasses_with_their_defaults():
    made = build(TrainConfig, {"generator": {"lr": 1, "betas": [0, 0.5]}}, "train")
    assert made.generator == type(made.generator)(lr=1.0, betas=(0.0, 0.5))
    assert made.critic == type(made.critic)()


def test_build_takes_instances_as_they_are():
    turns = Turns(critic_per_generator=3)
    assert resolve(given=TOY, sets=()).objective != build(
        type(resolve(given=TOY).objective), {"turns": turns}, "method"
    )
    assert build(type(resolve(given=TOY).objective), {"turns": turns}, "method").turns is turns


def test_build_checks_what_the_dataclass_checks():
    @dataclass(frozen=True, kw_only=True)
    class Even:
        n: int = 0

        def __post_init__(self):
            if self.n % 2:
                raise ValueError(f"n must be even, got {self.n}")

    assert build(Even, {"n": 4}, "method") == Even(n=4)
    with pytest.raises(ValueError, match=r"^method: n must be even, got 3$"):
        build(Even, {"n": 3}, "method")


@pytest.mark.parametrize("value", ["yes please", 1.5, [1], None])
def test_wrong_type_names_key_and_value(value):
    with pytest.raises(ValueError, match=r"^train\.seed = ") as caught:
        build(TrainConfig, {"seed": value}, "train")
    assert repr(value) in str(caught.value)


def test_differences_are_keys_with_both_values():
    old, new = ({**TOY, "train": {"seed": seed, "generator": {"lr": 1e-3}}} for seed in (0, 1))
    new["method"] = {"name": "dmd2", "guidance": 2.0}
    assert differences(old, new) == ["method.guidance: None -> 2.0", "train.seed: 0 -> 1"]


def test_differences_leave_out_what_a_resume_may_change():
    old = resolve(given=TOY).to_dict()
    values = {
        "device": "cpu",
        "tensorboard": "true",
        "prompt_cache": "disk",
        "offload_teacher": "true",
        "trackers": "[wandb]",
    }
    new = resolve(given=TOY, sets=[f"train.{name}={values.get(name, 7)}" for name in MAY_CHANGE])
    assert differences(old, new.to_dict()) == []


def test_a_run_of_an_earlier_version_lacks_settings_that_are_at_their_defaults():
    """Fails if a new setting ends the resuming of runs that were started before there was one."""
    new = resolve(given=TOY)
    old = new.to_dict()
    del old["train"]["compile"], old["train"]["generator"]["kind"], old["method"]["turns"]
    assert differences(old, new.to_dict(), new.defaults()) == []
    changed = resolve(given=TOY, sets=["train.compile=true", "method.turns.critic_per_generator=9"])
    found = differences(old, changed.to_dict(), changed.defaults())
    assert [line.partition(":")[0] for line in found] == ["method.turns.critic_per_generator", "train.compile"]


def test_differences_are_none_after_a_file(tmp_path):
    """Fails if tuples and lists, or 1 and 1.0, count as different."""
    made = resolve(given=TOY, sets=["train.generator.lr=1", "train.critic.betas=[0,0.5]"])
    (tmp_path / "config.yaml").write_text(made.to_yaml())
    assert differences(read_yaml(tmp_path / "config.yaml"), made.to_dict()) == []


def test_recipe_is_found_whatever_the_dashes():
    assert recipe_of("mixture", "dmd2") == recipe_of("mixture", "dmd2")
    path = recipe_of("fashion-dit", "dmd2")
    assert path is not None and path.name == "fashion_dit_dmd2.yaml"
    assert recipe_of("gaussian", "dmd2") is None


@pytest.mark.parametrize("name", ["someone/fashion-dit", "/data/fashion-dit", "./mixture"])
def test_recipe_is_a_registered_teachers_alone(name):
    """Fails if the last part of a path or hub id is taken for a name: it is another teacher."""
    assert recipe_of(name, "dmd2") is None


@pytest.mark.parametrize("name", ["fashion-dit", "mixture"])
def test_recipe_pins_no_device(name):
    assert resolve(given={"teacher": {"name": name}, "method": {"name": "dmd2"}}).train.device == "auto"


def test_device_without_float64_is_refused_and_says_why():
    with pytest.raises(ValueError, match=r"device 'mps' is not known; allowed: auto, cpu, cuda \(mps has no float64"):
        TrainConfig(device="mps")


def test_name_of_teacher_in_a_recipe_is_overridden_by_the_given_one(tmp_path):
    (tmp_path / "recipe.yaml").write_text("teacher: {name: mixture}\nmethod: {name: dmd2}\n")
    assert resolve(config=tmp_path / "recipe.yaml").teacher == "mixture"
    assert resolve(config=tmp_path / "recipe.yaml", given=TOY).teacher == "gaussian"
