"""Experts: who answers, who trains, what is saved."""

import pytest
import torch
from torch.testing import assert_close

from fewstep.models.ema import EMA
from fewstep.models.experts import Experts
from fewstep.models.trio import Trio
from fewstep.teachers.closed_form import gaussian
from tests import affine


def experts() -> Experts:
    made = [affine.trio().generator, affine.trio().real_score, affine.trio().fake_score]
    return Experts(made, (0.7, 0.3))


def test_times_choose_the_expert_sample_by_sample():
    """Each row as its own expert alone would answer it; the bound itself belongs to the cleaner one."""
    student, given = experts(), affine.batch(5)
    x = torch.randn(5, *given.shape, generator=torch.Generator().manual_seed(0))
    t, owners = torch.tensor([1.0, 0.7, 0.31, 0.3, 0.0]), (0, 1, 1, 2, 2)
    raw = student(x, t, given.cond).raw
    for i, owner in enumerate(owners):
        alone = student.expert(owner)(x[i : i + 1], t[i : i + 1], given.cond[i : i + 1]).raw
        assert_close(raw[i : i + 1], alone)
    assert_close(student(x, torch.full((5,), 0.5), given.cond).raw, student.expert(1)(x, t, given.cond).raw)
    with pytest.raises(ValueError, match="one expert"):
        student(x, t, given.cond, taps=("module",))


def test_only_the_active_one_trains_and_its_average_moves_alone():
    """Fails if the average of one expert is taken from another, or if a frozen one moves."""
    student = experts()
    average = EMA(student, 0.5)
    for active in (1, 2):
        student.activate(active)
        assert all(name.startswith(f"{active}.") for name in student.weights())
        before = {k: v.clone() for k, v in average.denoiser.state().items()}
        with torch.no_grad():
            for p in student.weights().values():
                p.add_(1.0)
        average.update(student)
        moved = {k for k, v in average.denoiser.state().items() if not torch.equal(v, before[k])}
        assert moved == set() or {k.split(".")[0] for k in moved} == {str(active)}


def test_average_restarts_from_the_present_weights():
    teacher = gaussian(fit_steps=1)

    def student(make):
        return Experts([make(), make()], (0.5,))

    trio = Trio.build(teacher.denoiser, frozenset(), init=teacher.student, student=student)
    average = EMA(trio.generator, 0.9)
    trio.generator.activate(1)
    with torch.no_grad():
        for p in trio.generator.weights().values():
            p.add_(1.0)
    average.update(trio.generator)
    assert average.updates == 1
    twin = {k: v.clone() for k, v in average.denoiser.state().items()}
    assert any(not torch.equal(v, trio.generator.state()[k]) for k, v in twin.items())
    average.restart(trio.generator)
    assert average.updates == 0
    for name, value in trio.generator.state().items():
        assert_close(average.denoiser.state()[name], value, atol=0, rtol=0)


@pytest.mark.parametrize("sharing", ["copies", "lora"])
def test_state_goes_back_expert_by_expert(sharing):
    teacher = gaussian(fit_steps=1)

    def build(kind=sharing):
        return Trio.build(
            teacher.denoiser,
            frozenset(),
            sharing=kind,
            init=teacher.student,
            student=lambda make: Experts([make(), make()], (0.5,)),
        ).generator

    student, again = build(), build()
    EMA(student, 0.5).update(student)  # experts around one teacher share its buffers
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for k in range(2):
            student.activate(k)
            for p in student.weights().values():
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
    x, t = torch.randn(4, 2, generator=generator), torch.tensor([0.9, 0.6, 0.4, 0.1])
    cond = teacher.encode([""] * 4)
    wanted = student(x, t, cond).raw
    again.load(student.state())
    assert_close(again(x, t, cond).raw, wanted, atol=0, rtol=0)
    plain = build("copies")
    plain.load(student.merged_state())
    assert_close(plain(x, t, cond).raw, wanted, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="experts"):
        student.plain_state()


def test_bounds_must_fit():
    with pytest.raises(ValueError, match="descending"):
        Experts([affine.trio().generator] * 3, (0.3, 0.7))
    with pytest.raises(ValueError, match="descending"):
        Experts([affine.trio().generator] * 2, ())
