"""Pairs of noise and the teacher's ODE: the right ones, whole, resumable, and of this teacher."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

import fewstep
from fewstep.sampling import sample_teacher
from fewstep.training import pairs
from fewstep.training.pairs import PairData, make_pairs, read_card

TEACHER = fewstep.teachers.mixture(classes=[0, 1, 2, 3, 4, 5, 6, 7], fit_steps=1)
PROMPTS = TEACHER.prompts


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch):
    monkeypatch.setattr(pairs, "SHARD", 4)


def made(out, n=10, **options):
    done: list[int] = []
    make_pairs(TEACHER, out, n, **{"num_steps": 4, "batch_size": 3, "progress": done.append, **options})
    return done


def data(folder, seed=0):
    return PairData(folder, TEACHER.encode, seed)


def test_a_pair_is_the_noise_of_its_number_and_what_the_teacher_makes_of_it(tmp_path):
    """The teacher's own sampler from the same seed gives the same pictures (points, here) under the same prompts.
    Fails if noise, prompt and sample of different pairs are put together."""
    made(tmp_path / "p", seed=70)
    folder = data(tmp_path / "p")
    rows = folder.order.rows(range(10)).tolist()
    images = sample_teacher(TEACHER, 10, PROMPTS, 70, num_steps=4)
    found = folder.batch(range(10))
    assert_close(found.x0, images[rows], atol=2e-3, rtol=1e-3)  # stored as fp16
    noise = torch.stack([torch.randn(2, generator=torch.Generator().manual_seed(70 + row)) for row in rows])
    assert_close(found.noise, noise, atol=0, rtol=0)
    own = TEACHER.encode([PROMPTS[row % len(PROMPTS)] for row in rows])
    assert_close(found.cond.tensors["class"], own.tensors["class"])


def test_every_pair_comes_once_an_epoch_in_an_order_of_its_own(tmp_path):
    made(tmp_path / "p")
    folder = data(tmp_path / "p")
    first, second = (folder.batch(range(start, start + 10)).x0 for start in (0, 10))
    assert not torch.equal(first, second)
    assert_close(first.sort(0).values, second.sort(0).values)
    assert_close(folder.batch([3]).x0[0], first[3])


def test_batch_and_shard_sizes_change_nothing(tmp_path, monkeypatch):
    made(tmp_path / "a")
    monkeypatch.setattr(pairs, "SHARD", 7)
    made(tmp_path / "b", batch_size=5)
    assert_close(data(tmp_path / "b").batch(range(10)).x0, data(tmp_path / "a").batch(range(10)).x0)
    made(tmp_path / "a", 11)  # a folder keeps its own
    assert [path.stem for path in sorted((tmp_path / "a").glob("*.safetensors"))] == [
        "00000000",
        "00000004",
        "00000008",
    ]


def test_a_killed_build_goes_on_and_makes_no_pair_twice(tmp_path):
    class Killed(Exception):
        pass

    def kill(count, seen=[]):  # noqa: B006 - it remembers on purpose
        seen.append(count)
        if sum(seen) >= 6:
            raise Killed

    with pytest.raises(Killed):
        made(tmp_path / "p", progress=kill)
    with pytest.raises(ValueError, match="holds 4 of its 10 pairs; run the same"):
        read_card(tmp_path / "p")
    whole = (tmp_path / "p" / "00000000.safetensors").stat().st_mtime_ns
    assert sum(made(tmp_path / "p")) == 10
    assert (tmp_path / "p" / "00000000.safetensors").stat().st_mtime_ns == whole
    made(tmp_path / "q")
    for path in sorted((tmp_path / "q").glob("*.safetensors")):
        assert path.read_bytes() == (tmp_path / "p" / path.name).read_bytes()


def test_a_folder_is_extended_by_the_same_settings(tmp_path):
    made(tmp_path / "p", 6)
    made(tmp_path / "p", 10)
    made(tmp_path / "q", 10)
    assert read_card(tmp_path / "p") == read_card(tmp_path / "q")
    assert_close(data(tmp_path / "p").batch(range(10)).x0, data(tmp_path / "q").batch(range(10)).x0, atol=0, rtol=0)


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"num_steps": 5}, "num_steps: 4 -> 5"),
        ({"guidance": 2.0}, "guidance: 1.0 -> 2.0"),
        ({"seed": 1}, "seed"),
        ({"prompts": PROMPTS[:1]}, "prompts"),
        ({"n": 6}, "n: 10 -> 6"),
    ],
)
def test_other_settings_do_not_mix_into_a_folder(tmp_path, other, named):
    made(tmp_path / "p")
    with pytest.raises(ValueError, match=named):
        made(tmp_path / "p", **other)


def test_a_folder_of_other_things_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match="holds no pairs; choose another --out"):
        made(tmp_path)


def test_a_damaged_shard_is_made_again_and_meanwhile_refused(tmp_path):
    made(tmp_path / "p")
    shard = tmp_path / "p" / "00000004.safetensors"
    kept = shard.read_bytes()
    shard.write_bytes(kept[:20])
    with pytest.raises(ValueError, match="holds 6 of its 10"):
        data(tmp_path / "p")
    made(tmp_path / "p")
    assert shard.read_bytes() == kept


def test_noise_that_cannot_be_made_again_is_noticed(tmp_path):
    """Another version's generator would pair each sample with the wrong noise, and the loss would only look high."""
    made(tmp_path / "p")
    shard = tmp_path / "p" / "00000000.safetensors"
    tensors = load_file(shard)
    save_file({**tensors, "first_noise": tensors["first_noise"] + 1e-3}, shard)
    with pytest.raises(ValueError, match="cannot be made again by this version of torch"):
        data(tmp_path / "p")


def test_a_card_that_describes_nothing_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="fewstep pairs"):
        read_card(tmp_path)
    (tmp_path / "pairs.json").write_text(json.dumps({"n": 3}))
    with pytest.raises(ValueError, match="does not describe pairs"):
        read_card(tmp_path)


def test_the_card_says_what_made_them(tmp_path):
    made(tmp_path / "p", guidance=1.0)
    card = dataclasses.asdict(read_card(tmp_path / "p"))
    assert {k: card[k] for k in ("teacher", "num_steps", "guidance", "n")} == {
        "teacher": TEACHER.card.source,
        "num_steps": 4,
        "guidance": 1.0,
        "n": 10,
    }
