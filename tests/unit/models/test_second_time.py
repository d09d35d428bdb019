"""A second time changes nothing at first, is learned, and folds away for one step."""

import copy

import pytest
import torch
from torch.testing import assert_close

from fewstep.api import load_teacher
from fewstep.models.adapters import LoRA
from fewstep.models.denoiser import Denoiser
from fewstep.models.second_time import with_second_time
from fewstep.models.trio import Trio
from fewstep.teachers.closed_form import gaussian
from fewstep.types import Condition
from tests.tiny_pipeline import build, build_stable_diffusion

PROMPTS = ["a photo of a bag", "a photo of a coat"]


@pytest.fixture(scope="module", params=["dit", "unet", "points"])
def start(request, tmp_path_factory) -> tuple[Denoiser, Condition, tuple[int, ...]]:
    """A network to start from, a condition of two samples and their shape."""
    if request.param == "points":
        teacher = gaussian(fit_steps=1)
        return teacher.student(), teacher.encode(["", ""]), teacher.shape
    folder = tmp_path_factory.mktemp(request.param)
    (build if request.param == "dit" else build_stable_diffusion)(folder)
    teacher = load_teacher(str(folder))
    return teacher.denoiser, teacher.encode(PROMPTS), teacher.shape


def trio(start, sharing="copies") -> Trio:
    return Trio.build(
        start[0],
        frozenset({"fake_score"}),
        sharing=sharing,
        lora=LoRA(rank=2, alpha=2.0),
        student=lambda make: with_second_time(make(), seed=3),
    )


def call(network, start, until):
    x = torch.randn(2, *start[2], generator=torch.Generator().manual_seed(1))
    cond = start[1] if until is None else start[1].also(until=torch.tensor(until))
    return network(x, torch.tensor([0.9, 0.4]), cond).raw


@pytest.mark.parametrize("sharing", ["copies", "lora"])
def test_at_the_start_it_changes_nothing_but_learns(start, sharing):
    """All weights of the added network but those behind its zero layer get a gradient at once, those after one step."""
    players = trio(start, sharing)
    student = players.generator
    assert_close(call(student, start, [0.0, 0.7]), call(start[0], start, None), atol=0, rtol=0)
    assert list(student.own) == ["until"] and not players.critic().own and not players.real_score.own
    with players.turn("generator"):
        mine = {name: p for name, p in student.weights().items() if name.startswith("own.")}
        assert len(mine) == 4
        optimizer = torch.optim.SGD(mine.values(), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            call(student, start, [0.0, 0.7]).square().mean().backward()
            optimizer.step()
        assert all(p.grad.abs().sum() > 0 for p in mine.values())
    assert (call(student, start, [0.0, 0.7]) - call(student, start, [0.7, 0.7]))[0].abs().max() > 0
    assert_close(call(player := players.critic(), start, None), call(start[0], start, None), atol=0, rtol=0)
    assert player.state().keys().isdisjoint(mine)


@pytest.mark.parametrize("sharing", ["copies", "lora"])
def test_state_average_and_merge_hold_the_added_part(start, sharing):
    """Fails if an adapted role's state forgets what was added to it."""
    student = trio(start, sharing).generator
    with torch.no_grad():
        for p in student.weights().values():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(2)))
    wanted = call(student, start, [0.2, 0.0])
    again = trio(start, sharing).generator
    again.load(student.state())
    assert_close(call(again, start, [0.2, 0.0]), wanted, atol=0, rtol=0)
    twin = student.twin()
    assert twin.own["until"].outer.weight is not student.own["until"].outer.weight
    plain = trio(start).generator
    plain.load(student.merged_state())
    assert_close(call(plain, start, [0.2, 0.0]), wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("sharing", ["copies", "lora"])
def test_one_step_needs_no_second_time(start, sharing):
    """What it adds at 0 folds into a bias: the pipeline's own network gives the same.  Fails if it is left out."""
    student = trio(start, sharing).generator
    with torch.no_grad():
        for p in student.weights().values():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(2)))
    plain = copy.deepcopy(start[0])
    plain.load(student.plain_state())
    assert_close(call(plain, start, None), call(student, start, [0.0, 0.0]), atol=1e-5, rtol=1e-4)


def test_what_it_is_not_told_is_an_error(start):
    with pytest.raises(ValueError, match="until"):
        call(trio(start).generator, start, None)


def test_a_family_without_a_time_embedding_is_refused():
    teacher = gaussian()
    with pytest.raises(ValueError, match="time_embedding"):
        with_second_time(teacher.denoiser)


def test_it_guides_as_its_network_does(start, monkeypatch):
    """Fails if the wrapper falls back on plain guidance: a family may have its own, as Qwen-Image."""
    generator = trio(start).generator
    monkeypatch.setattr(generator.backbone.inner, "guide", lambda c, u, scale: c - scale)
    said = generator(torch.zeros(2, *start[2]), torch.tensor([0.9, 0.4]), start[1].also(until=torch.tensor([0.5, 0.1])))
    assert said.guide(torch.ones(2), torch.zeros(2), 3.0).tolist() == [-2, -2]
