"""`fewstep eval --protocol` and `fewstep reference`: figures through the command line, and what is refused.

Inception's weights are not packaged: a seeded stand-in of six features is read from a file of the published name and
format, and its figures must not be called FID.
"""

import json
import shutil
import statistics
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image

from fewstep.metrics import inception
from fewstep.metrics.features import extract, load_fashion_classifier, load_reference
from fewstep.metrics.frechet import Moments, frechet_distance, moments_distance
from fewstep.metrics.image_folder import SUFFIXES
from fewstep.metrics.manifold import manifold
from fewstep.metrics.protocols import PROTOCOLS
from fewstep.students import load_student
from tests.cli.test_bad_inputs import check_refused

EDM = ("--protocol", "edm-fid50k", "--device", "cpu")


class Corners(torch.nn.Module):
    """Inception's stand-in: two corners of each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = torch.nn.Linear(6, 4)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return torch.cat([pixels[:, :, 0, 0], pixels[:, :, -1, -1]], 1)


def draw(folder: Path, n: int, seed: int, size: tuple[int, ...] = (9, 8, 3)) -> torch.Tensor:
    """n noisy pictures in a folder; their bytes [n, H, W, 3]."""
    folder.mkdir(parents=True, exist_ok=True)
    pixels = numpy.random.default_rng(seed).integers(0, 256, (n, *size), dtype=numpy.uint8)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{i:03}.png")
    return torch.from_numpy(pixels)


def corners(pixels: torch.Tensor) -> torch.Tensor:
    """What the stand-in sees: the first pixel, and the one that TensorFlow's resize reads last, between two or four."""
    return Corners()(inception.tf1_resize(pixels.permute(0, 3, 1, 2)))


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def weights(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(inception, "Inception", Corners)
    monkeypatch.setenv("FEWSTEP_WEIGHTS", str(tmp_path / "weights"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    (tmp_path / "weights").mkdir()
    torch.save(Corners().state_dict(), tmp_path / "weights" / inception.FILE)
    return tmp_path / "weights" / inception.FILE


@pytest.fixture
def stage(weights, tmp_path, cli) -> tuple[Path, Path, torch.Tensor, torch.Tensor]:
    """A folder of 20 images, a reference of 30 reals, and the bytes of both."""
    fake, real = draw(tmp_path / "images", 20, 0), draw(tmp_path / "reals", 30, 1)
    done = cli("reference", tmp_path / "reals", *EDM, "--to", tmp_path / "r.npz", "--unverified")
    assert done.exit_code == 0, done.output
    return tmp_path / "images", tmp_path / "r.npz", fake, real


def test_a_folder_is_measured_and_written_down(cli, stage):
    """The distance by hand, under a name that says weights and count; a line holds what it depends on."""
    folder, reference, fake, real = stage
    done = cli("eval", folder, *EDM, "--reference", reference, "--unverified")
    assert done.exit_code == 0, done.output
    (line,) = lines(folder / "figures.jsonl")
    expected = moments_distance(Moments.of(corners(fake)), Moments.of(corners(real)))
    assert line["figures"] == {"FD[inception-unverified]@20": pytest.approx(expected, rel=1e-9)}
    assert "FD[inception-unverified]@20" in done.stdout and "20 images are fewer than the 50000" in done.stderr
    assert line["protocol_hash"] == PROTOCOLS["edm-fid50k"].hash and line["n"] == 20
    assert line["extractor"]["resize"] == "tf1-bilinear" and not line["extractor"]["verified"]
    assert line["reference"]["n"] == 30 and len(line["reference"]["sha256"]) == len(line["extractor"]["sha256"]) == 64


def test_a_folder_of_reals_is_a_reference_too(cli, stage, tmp_path, weights):
    """The same figure as by its npz, and its features serve the neighbours; the hash given makes the weights known."""
    from fewstep.metrics.features import file_sha256

    folder, reference, fake, real = stage
    known = ("--sha256", file_sha256(weights), "--to", tmp_path / "lines.jsonl")
    for source, further in ((reference, []), (tmp_path / "reals", ["--also", "manifold"])):
        done = cli("eval", folder, *EDM, "--reference", source, *known, *further)
        assert done.exit_code == 0, done.output
    first, second = (line["figures"] for line in lines(tmp_path / "lines.jsonl"))
    assert first["FID@20"] == pytest.approx(second["FID@20"], rel=1e-9)
    found = manifold(corners(fake), corners(real), k=3, k_density=5)
    assert second["coverage@20"] == pytest.approx(found.coverage) and second["density@20"] == found.density


def test_kept_features_serve_as_well(cli, stage, tmp_path, weights):
    folder = stage[0]
    made = cli("reference", tmp_path / "reals", *EDM, "--to", tmp_path / "f.npz", "--unverified", "--features")
    assert made.exit_code == 0, made.output
    done = cli("eval", folder, *EDM, "--reference", tmp_path / "f.npz", "--unverified", "--also", "manifold")
    assert done.exit_code == 0 and "coverage[inception-unverified]@20" in done.stdout, done.output


def test_categories_are_measured_apart(cli, weights, tmp_path, monkeypatch):
    """MJHQ-30K's overall figure and one of each subfolder."""
    from dataclasses import replace

    small = replace(PROTOCOLS["mjhq30k"], size=8, count=20, categories=("art", "food"))
    monkeypatch.setitem(PROTOCOLS, "mjhq30k", small)
    for seed, name in enumerate(small.categories):
        draw(tmp_path / "images" / name, 10, seed, (8, 8, 3))
        draw(tmp_path / "reals" / name, 12, seed + 7, (8, 8, 3))
    flags = ("--protocol", "mjhq30k", "--unverified", "--device", "cpu")
    assert cli("reference", tmp_path / "reals", *flags, "--to", tmp_path / "r.npz").exit_code == 0
    done = cli("eval", tmp_path / "images", *flags, "--reference", tmp_path / "r.npz")
    assert done.exit_code == 0, done.output
    plain = "FD[inception-unverified]"
    assert set(lines(tmp_path / "images" / "figures.jsonl")[0]["figures"]) == {plain, f"{plain} art", f"{plain} food"}


FASHION = ("--protocol", "fashion-fmd", "--device", "cpu")


@pytest.fixture(scope="module")
def fashion_run(cli, tmp_path_factory) -> Path:
    """A student of the embedded teacher after one update."""
    out = tmp_path_factory.mktemp("fashion") / "run"
    done = cli(
        "distill", "--teacher", "fashion-dit", "--method", "dmd2", "--iterations", "1", "--batch-size", "2",
        "--device", "cpu", "--set", "train.evaluate_samples=140", "--out", out,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    return out


@pytest.mark.slow
def test_a_student_is_measured_as_its_files_would_be(cli, fashion_run, tmp_path):
    """Sets of samples by seed, of the noise of their own numbers; FMD by hand. Mutation: one seed for all batches."""
    done = cli("eval", fashion_run, *FASHION, "-n", "60", "--seed", "7", "--seeds", "2", "--to", tmp_path / "l.jsonl")
    assert done.exit_code == 0, done.output
    assert "60 images for 128 features" in done.stderr
    first, second, _ = lines(tmp_path / "l.jsonl")
    assert (first["seed"], second["seed"]) == (7, 67) and first["n"] == 60
    student, real = load_student(fashion_run, device="cpu"), load_reference()
    for line in (first, second):
        features, _ = extract(load_fashion_classifier(), student.sample(60, seed=line["seed"]))
        own = Moments.of(features)
        expected = frechet_distance(own.mean, own.cov, real.mean, real.cov)
        assert line["figures"]["FMD@60"] == pytest.approx(expected, rel=1e-6)


def test_seeds_give_mean_deviation_and_minimum_of_disjoint_sets(cli, stage, pipeline_run, tmp_path):
    """EDM's three sets are of the seeds 0.., n.. and 2n..; mutations: overlapping sets, the first one as the least."""
    asked = ("-n", "8", "--seed", "0", "--seeds", "3", "--unverified", "--to", tmp_path / "l.jsonl")
    (tmp_path / "p.txt").write_text("a bag\na coat\n")
    done = cli("eval", pipeline_run, *EDM, "--reference", stage[1], *asked, "--prompts", tmp_path / "p.txt")
    assert done.exit_code == 0, done.output
    *sets, over = lines(tmp_path / "l.jsonl")
    name = "FD[inception-unverified]@8"
    values = [line["figures"][name] for line in sets]
    assert [line["seed"] for line in sets] == [0, 8, 16] and len(set(values)) == 3
    assert over["figures"][name] == pytest.approx(statistics.fmean(values), rel=1e-12)
    assert over["spread"][name] == pytest.approx(statistics.stdev(values), rel=1e-9)
    assert over["least"][name] == min(values) and over["seeds"] == 3
    assert f"| 3 x 8 | {over['figures'][name]:.4g} ± " in done.stdout and f"(min {min(values):.4g})" in done.stdout


def test_the_packaged_reference_needs_no_file(cli, tmp_path):
    """FMD of 130 pictures, as by its parts."""
    pixels = draw(tmp_path / "images", 130, 0, (32, 32))
    done = cli("eval", tmp_path / "images", *FASHION)
    assert done.exit_code == 0, done.output
    (line,) = lines(tmp_path / "images" / "figures.jsonl")
    assert line["folder"] == str((tmp_path / "images").resolve())
    features, _ = extract(load_fashion_classifier(), pixels[:, None])
    assert line["figures"]["FMD@130"] == pytest.approx(moments_distance(Moments.of(features), load_reference()))


# -- refusals -----------------------------------------------------------------------------------------------------


def edited(reference: Path, **changes) -> None:
    with numpy.load(reference) as stored:
        arrays = {name: stored[name] for name in stored.files}
    numpy.savez(reference, **{name: value for name, value in (arrays | changes).items() if value is not None})


def emptied(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def kept(folder: Path, n: int) -> None:
    for path in sorted(folder.iterdir())[n:]:
        path.unlink()


def cut(folder: Path) -> None:
    path = folder / "007.png"
    path.write_bytes(path.read_bytes()[:60])


REFUSALS = {
    "empty": (lambda images, _: emptied(images), [], ["no image in", *SUFFIXES]),
    "no-folder": (lambda images, _: shutil.rmtree(images), [], ["no run or folder of images at"]),
    "mixed": (
        lambda images, _: Image.new("RGB", (3, 3)).save(images / "zz.png"),
        [],
        ["zz.png is 3x3", "000.png is 8x9", "crops nothing"],
    ),
    "corrupt": (lambda images, _: (images / "003.png").write_bytes(b"?"), [], ["003.png is no image"]),
    "cut-off": (lambda images, _: cut(images), [], ["007.png is damaged"]),
    "few": (lambda images, _: kept(images, 6), [], ["set of samples has 6 images for 6 features", "at least 7"]),
    "npz": (lambda _, npz: npz.write_bytes(b"?"), [], ["no npz file", "pickle"]),
    "pickled": (lambda _, npz: edited(npz, mu=numpy.array([{}], dtype=object)), [], ["without unpickling"]),
    "lacking": (lambda _, npz: edited(npz, sigma=None), [], ["lacks sigma"]),
    "nan": (lambda _, npz: edited(npz, mu=numpy.full(6, numpy.nan)), [], ["not finite"]),
    "asymmetric": (lambda _, npz: edited(npz, sigma=numpy.triu(numpy.ones((6, 6)))), [], ["not symmetric"]),
    "dimension": (
        lambda _, npz: edited(npz, mu=numpy.zeros(5), sigma=numpy.eye(5), meta=None),
        [],
        ["has 5 features, inception has 6"],
    ),
    "few-reals": (lambda _, npz: edited(npz, n=numpy.array(6)), [], ["r.npz has 6 images for 6 features"]),
    "protocol": (
        None,
        ["--protocol", "sid-coco30k"],
        ["r.npz is of protocol edm-fid50k", "not of sid-coco30k", "fewstep reference"],
    ),
    "no-reference": (None, ["--reference", "nowhere.npz"], ["no reference at nowhere.npz", "fewstep reference FOLDER"]),
    "unknown": (None, ["--protocol", "fid"], ["no protocol named 'fid'", "edm-fid50k"]),
    "also": (None, ["--also", "lpips"], ["no figure named lpips", "kid, manifold, inception_score"]),
    "features": (None, ["--also", "manifold"], ["holds moments alone", "manifold", "--features"]),
    "subsets": (None, ["--also", "kid", "--reference", "reals"], ["subsets of 1000", "20 images"]),
    "prompts": (None, ["--clip", "clip"], ["needs the images' prompts", "--prompts FILE"]),
    "prompt-count": (None, ["--clip", "clip", "--prompts", "two.txt"], ["2 prompts for 20 images"]),
    "clip": (None, ["--clip", "clip", "--prompts", "twenty.txt"], ["no CLIP weights"]),
    "samples-of-a-folder": (None, ["-n", "5"], ["are of a run's student"]),
    "hash": (None, ["--sha256", "00000000"], ["should begin with 00000000"]),
    "no-hash": (None, ["--sha256", ""], ["is no SHA-256"]),
    "teacher": (None, ["--recompute-teacher"], ["--recompute-teacher", "without --protocol"]),
    "device": (None, ["--device", "tpu"], ["device 'tpu'", "allowed"]),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_be_measured_is_refused(cli, stage, tmp_path, monkeypatch, case):
    """One message, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "two.txt").write_text("a\nb\n")
    (tmp_path / "twenty.txt").write_text("a\n" * 20)
    folder, reference, *_ = stage
    break_it, flags, words = REFUSALS[case]
    if break_it is not None:
        break_it(folder, reference)
    allowed = [] if case == "hash" else ["--unverified"]
    check_refused(cli("eval", folder, *EDM, "--reference", reference, *allowed, *flags), *words)
    assert not (folder / "figures.jsonl").exists()


def test_a_missing_open_clip_is_one_message(cli, stage, tmp_path, monkeypatch):
    """Mutation: what is missing ends in a traceback."""
    (tmp_path / "clip").mkdir()
    for name in ("open_clip_config.json", "open_clip_model.safetensors"):
        (tmp_path / "clip" / name).touch()
    monkeypatch.setattr("fewstep.metrics.open_clip_score.find_spec", lambda name: None)
    asked = ("--protocol", "dmd2-coco30k", "--reference", stage[1], "--clip", tmp_path / "clip")
    check_refused(cli("eval", stage[0], *asked, "--device", "cpu"), "needs open_clip: pip install 'fewstep[eval]'")


def test_unverified_weights_are_refused_unless_allowed(cli, stage):
    folder, reference, *_ = stage
    check_refused(cli("eval", folder, *EDM, "--reference", reference), "should begin with 6726825d", "--unverified")


def test_a_reference_by_other_weights_is_refused(cli, stage, weights):
    """Same name, same number of features: only the hash tells."""
    folder, reference, *_ = stage
    torch.save(Corners().state_dict(), weights)
    words = ("r.npz was made by an extractor of sha256", "make it with the same weights")
    check_refused(cli("eval", folder, *EDM, "--reference", reference, "--unverified"), *words)


def test_missing_weights_are_named(cli, stage, weights):
    folder, reference, *_ = stage
    weights.unlink()
    words = (inception.FILE, "FEWSTEP_WEIGHTS", "nothing is downloaded")
    check_refused(cli("eval", folder, *EDM, "--reference", reference), *words)


def test_too_many_images_are_refused(cli, stage, monkeypatch):
    from dataclasses import replace

    folder, reference, *_ = stage
    monkeypatch.setitem(PROTOCOLS, "edm-fid50k", replace(PROTOCOLS["edm-fid50k"], count=19))
    check_refused(cli("eval", folder, *EDM, "--reference", reference), "20 images are more than the 19 of edm-fid50k")


def test_a_protocol_without_a_reference_says_what_it_needs(cli, stage):
    check_refused(cli("eval", stage[0], *EDM), "needs --reference", "moments of the whole training set")


@pytest.mark.parametrize(
    "flag", ["--reference", "--images", "--also", "--sha256", "--clip", "--clip-sha256", "--prompts", "--to"]
)
def test_flags_of_a_protocol_need_one(cli, toy_run, flag):
    """Mutation: a setting without effect is taken."""
    check_refused(cli("eval", toy_run, flag, "x"), f"{flag} goes with --protocol NAME")


@pytest.mark.parametrize(
    ("to", "words"), [("r.npy", ["should end in .npz"]), ("r.npz", ["exists; choose another --to"])]
)
def test_a_reference_is_not_written_anywhere(cli, stage, tmp_path, to, words):
    check_refused(cli("reference", tmp_path / "reals", *EDM, "--to", tmp_path / to, "--unverified"), *words)


def test_too_few_reals_make_no_reference(cli, stage, tmp_path):
    kept(tmp_path / "reals", 6)
    words = ("6 images for 6 features", "at least 7")
    check_refused(cli("reference", tmp_path / "reals", *EDM, "--to", tmp_path / "n.npz", "--unverified"), *words)
    assert not (tmp_path / "n.npz").exists()


def test_protocols_are_listed(cli):
    done = cli("list", "protocols")
    assert done.exit_code == 0 and "dmd2-coco30k" in done.stdout.replace("\n", "")
