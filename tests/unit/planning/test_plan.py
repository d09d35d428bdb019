"""What a plan says of small teachers, against counts by hand; and what it refuses."""

import json

import pytest
import torch

from fewstep.config import resolve
from fewstep.planning.fit import first_fit, fits, remedies
from fewstep.planning.plan import Plan, plan
from fewstep.planning.report import answer
from fewstep.teachers.outline import outline
from fewstep.teachers.pipelines import load_teacher

UNET = 2_491_172
"""Parameters of fashion-unet."""


def planned(*sets: str, teacher: str = "fashion-unet", method: str = "dmd2", **more) -> Plan:
    return plan(configured(*sets, teacher=teacher, method=method), **more)


def configured(*sets: str, teacher: str = "fashion-unet", method: str = "dmd2"):
    given = {"teacher": {"name": teacher}, "method": {"name": method}, "train": {"batch_size": 4, "ema": 0.0}}
    return resolve(given=given, sets=sets)


@pytest.mark.parametrize("name", ["fashion-unet", "fashion-dit"])
def test_outline_is_the_teacher_without_numbers(name):
    real, drawn = load_teacher(name), outline(name)
    shapes = [{k: (v.shape, v.dtype) for k, v in t.denoiser.state_dict().items()} for t in (real, drawn)]
    assert shapes[0] == shapes[1] and all(p.is_meta for p in drawn.denoiser.parameters())
    assert (real.shape, real.denoiser.predicts) == (drawn.shape, drawn.denoiser.predicts)
    assert type(real.denoiser.schedule) is type(drawn.denoiser.schedule)
    told = [t.encode(real.prompts[:2]) for t in (real, drawn)]
    for group in ("tensors", "null"):
        assert {k: v.shape for k, v in getattr(told[0], group).items()} == {
            k: v.shape for k, v in getattr(told[1], group).items()
        }


def test_three_copies_and_two_optimisers():
    """Weights of generator, real and fake score; two moments of the two that train; DMD2's own calls."""
    made = planned("method.num_steps=4", "method.turns.critic_per_generator=5", device="cpu")
    for turn in ("generator", "critic"):
        assert made.bytes(turn)["weights"] == pytest.approx(3 * 4 * UNET, rel=1e-3)  # and buffers
        assert made.bytes(turn)["optimiser"] == pytest.approx(2 * 2 * 4 * UNET, rel=0.05)  # and temporaries
    assert made.trained == {"generator": UNET, "fake_score": UNET}
    assert made.parts["generator"].calls == {"generator": 4, "real_score": 2, "fake_score": 1}
    assert made.parts["critic"].calls == {"generator": 4, "fake_score": 1}
    assert made.parts["generator"].share == pytest.approx(0.2, abs=0.01) and made.parts["critic"].share == 1


def test_adapters_share_the_teachers_weights():
    made = planned("train.sharing=lora", "train.lora.rank=4", device="cpu")
    own = sum(made.trained.values())
    assert own < 0.2 * UNET
    assert made.bytes("critic")["weights"] == pytest.approx(4 * (UNET + own), rel=1e-3)
    assert made.bytes("critic")["optimiser"] == pytest.approx(2 * 4 * own, rel=0.05)


def test_average_is_a_copy_of_its_own():
    assert planned("train.ema=0.9").bytes("critic")["ema"] == pytest.approx(4 * UNET, rel=1e-3)


def test_micro_batches_take_the_memory_of_one_and_the_flops_of_all():
    whole, parted = planned("train.batch_size=8"), planned("train.batch_size=8", "train.accumulate=4")
    assert (whole.micro_batch, parted.micro_batch) == (8, 2)
    assert parted.flops == pytest.approx(whole.flops, rel=1e-3)
    assert parted.bytes("critic")["activations"] < 0.5 * whole.bytes("critic")["activations"]
    assert planned("train.batch_size=8", gpus=4).micro_batch == 2


def test_activations_grow_with_the_batch_and_shrink_by_checkpointing():
    small, large, again = (
        planned(f"train.batch_size={n}", f"train.gradient_checkpointing={kept}")
        for n, kept in ((16, "false"), (32, "false"), (32, "true"))
    )
    held = [made.bytes("critic")["activations"] for made in (small, large, again)]
    assert held[1] == pytest.approx(2 * held[0], rel=0.15) and held[2] < 0.6 * held[1]
    # Rollout, forward and backward of two are four forwards; a UNet computes most of one again.
    assert 1.1 < again.parts["critic"].flops / large.parts["critic"].flops < 1.25


def test_bf16_halves_activations_but_not_the_weights_that_train():
    plain, half = planned("train.batch_size=64"), planned("train.batch_size=64", "train.precision=bf16")
    assert half.bytes("critic")["weights"] == plain.bytes("critic")["weights"]
    assert half.bytes("critic")["optimiser"] == plain.bytes("critic")["optimiser"]
    # Norms stay in float32, and casts of weights are kept.
    assert 0.5 < half.bytes("critic")["activations"] / plain.bytes("critic")["activations"] < 0.9


def test_fsdp_divides_all_but_activations():
    one, four = planned("train.batch_size=4"), planned("train.batch_size=16", gpus=4, sharded=True)
    for kind, size in one.bytes("critic").items():
        if kind != "gathered":
            assert four.bytes("critic")[kind] == pytest.approx(size if kind == "activations" else size / 4, rel=0.01)
    assert one.gathered == 0 < four.gathered < one.bytes("critic")["weights"] / 3


def test_fsdp_gathers_blocks_in_bf16_and_keeps_no_casts():
    """Of a run in bf16 autocast keeps a copy of every weight of a forward; what FSDP gathers needs none."""
    sets = ("train.batch_size=4", "train.precision=bf16")
    whole, half = planned(*sets, gpus=2), planned(*sets, gpus=2, sharded=True)
    full = planned(*sets[:1], gpus=2, sharded=True).gathered
    assert half.gathered == full * 2 / 3  # twice a block of the teacher's own float32; full: thrice of what trains
    most = [made.parts["critic"].peak.activations for made in (whole, half)]
    assert most[0] - most[1] == pytest.approx(2 * UNET, rel=0.1)  # the fake score's, 2 bytes each; norms are not cast


@pytest.mark.parametrize(
    ("method", "sets"),
    [
        ("dmd2", ("method.gan_weight=1e-3",)),
        ("sid", ()),
        ("sid", ("method.gan_weight=1e-3", "method.gan_head=learned")),
        ("tbcm", ("method.black_filter=false",)),
        ("dmd", ("method.distance=mse",)),
        ("decoupled_dmd", ()),
        ("swiftbrush", ()),
        ("boot", ()),
        ("scm", ()),
        ("meanflow", ()),
        ("phased_dmd", ()),
    ],
)
def test_methods_can_be_planned(method, sets):
    made = planned(*sets, method=method)
    assert made.peak > 4 * 2 * UNET and made.flops > 0
    assert made.parts["generator"].calls["generator"] >= 1


def test_transformer_methods_can_be_planned():
    assert planned(teacher="fashion-dit", method="tmd").peak > 0


def test_resolution_scales_what_activations_take():
    small, large = planned("train.batch_size=16"), planned("train.batch_size=16", "teacher.resolution=64")
    assert (small.size, large.size) == ((32, 32), (64, 64))
    assert large.bytes("critic")["activations"] > 3 * small.bytes("critic")["activations"]


def test_folder_of_configs_is_enough(pipeline_configs):
    made = planned(teacher=str(pipeline_configs))
    assert made.parameters["teacher"] == UNET


@pytest.fixture
def pipeline_configs(tmp_path):
    """A folder of fashion-unet's .json files alone."""
    from fewstep.teachers.fashion import WEIGHTS

    for path in (WEIGHTS / "fashion-unet").rglob("*.json"):
        to = tmp_path / "configs" / path.relative_to(WEIGHTS / "fashion-unet")
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_bytes(path.read_bytes())
    return tmp_path / "configs"


def test_remedies_are_cumulative_and_end_in_adapters_and_pixels():
    made = planned("train.batch_size=8")
    flags = [remedy.flags for remedy in remedies(made)]
    assert flags[0] == ("--gradient-checkpointing",)
    assert flags[1] == ("--gradient-checkpointing", "--set train.accumulate=8")
    eight, away = "--set train.generator.kind=adamw8bit --set train.critic.kind=adamw8bit", "train.offload_teacher=true"
    assert flags[3][-1] == eight and flags[4][-1] == f"--set {away}"
    assert flags[-1][-2:] == (eight, "--sharing lora") and not any(away in flag for flag in flags[-1])
    for remedy in remedies(made):
        assert remedy.config != made.config


def test_first_fit_is_the_first_that_fits():
    made = planned("train.batch_size=64")
    found = first_fit(made, made.needed - 0.02)
    assert found is not None and fits(found[1], made.needed - 0.02)
    assert found[0].flags == ("--gradient-checkpointing",)
    assert first_fit(made, 0.5) is None  # CUDA's own context is more


def test_answer_as_json_is_figures():
    said = []
    text, fit = answer(configured(), 1, False, 1.01, as_json=True, say=said.append)
    figures = json.loads(text)
    assert not fit and figures["fits"] is False and said
    assert figures["peak"] == max(turn["peak"] for turn in figures["turns"].values())


@pytest.mark.parametrize(
    ("error", "match", "sets", "more"),
    [
        (ValueError, "not a multiple of this network's 8 pixels; take 32", ("teacher.resolution=33",), {}),
        (ValueError, "not a multiple of accumulate x gpus", (), {"gpus": 3}),
        (ValueError, "give --gpus", (), {"sharded": True}),
        (ValueError, "gpus must be >= 1", (), {"gpus": 0}),
        (ValueError, "--set method.distance=mse", ("method.name=dmd", "method.distance=lpips"), {}),
        (LookupError, "Did you mean 'sdxl'", ("teacher.name=sdx",), {}),
        (LookupError, "no architecture of 'mixture' is shipped", ("teacher.name=mixture",), {}),
    ],
)
def test_what_cannot_be_planned_is_said_with_a_remedy(error, match, sets, more):
    names = dict(item.split(".name=") for item in sets if ".name=" in item)
    sets = tuple(item for item in sets if ".name=" not in item)
    with pytest.raises(error, match=match):
        planned(*sets, **names, **more)


def test_plan_leaves_no_override_behind():
    planned()
    x = torch.empty(1, 1, 8, 4, device="meta")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.nn.functional.linear(x, torch.empty(3, 4, device="meta")).dtype == torch.float32
