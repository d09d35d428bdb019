"""Claims about reference files: what others read of ours, what we read of others', and what is refused."""

import json
import pickle
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch
from torch.testing import assert_close

from fewstep.metrics.extractors import Extractor
from fewstep.metrics.frechet import Moments
from fewstep.metrics.protocols import PROTOCOLS
from fewstep.metrics.reference import (
    Gaussian,
    Reference,
    check_enough,
    check_extractor,
    check_reference,
    meta_of,
    read_reference,
    write_reference,
)

EDM, FASHION = PROTOCOLS["edm-fid50k"], PROTOCOLS["fashion-fmd"]
NETWORK = Extractor("inception", 4, 3, "tf1-bilinear", "ab" * 32, True, lambda images: images)


def features(n: int = 9, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, 4, generator=torch.Generator().manual_seed(seed))


def made(**changes) -> Reference:
    seen = features()
    whole = Reference(Gaussian.of(Moments.of(seen)), {}, seen, meta_of(EDM, NETWORK))
    return replace(whole, **changes)


def arrays(**changes) -> dict:
    return {"mu": numpy.zeros(4), "sigma": numpy.eye(4), **changes}


def stored(path: Path, **changes) -> Path:
    numpy.savez(path, **{name: value for name, value in arrays(**changes).items() if value is not None})
    return path


def test_what_is_written_is_read(tmp_path):
    """Every number, exactly; parts by category, and without features where none are kept."""
    part = Gaussian.of(Moments.of(features(7, 1)))
    reference = made(parts={"art": part})
    write_reference(reference, tmp_path / "r.npz")
    found = read_reference(tmp_path / "r.npz")
    assert found.whole.n == 9 and found.parts["art"].n == 7 and found.meta == reference.meta
    for mine, read in ((reference.whole, found.whole), (part, found.parts["art"])):
        assert_close((read.mu, read.sigma), (mine.mu, mine.sigma), rtol=0, atol=0)
    assert found.features is not None and bool((found.features == reference.features).all())
    write_reference(made(features=None), tmp_path / "s.npz")
    assert read_reference(tmp_path / "s.npz").features is None


def test_others_find_mu_and_sigma_in_it(tmp_path):
    """As EDM and clean-fid read it: float64, divisor n - 1, no pickle."""
    write_reference(made(), tmp_path / "r.npz")
    with numpy.load(tmp_path / "r.npz", allow_pickle=False) as found:
        assert found["mu"].dtype == found["sigma"].dtype == numpy.float64
        assert_close(found["sigma"], numpy.cov(features().double().numpy(), rowvar=False), rtol=1e-12, atol=1e-12)
        assert json.loads(str(found["meta"]))["protocol_hash"] == EDM.hash


def test_files_of_mu_and_sigma_alone_are_read(tmp_path):
    """clean-fid's mu is float32; neither says how many features it is of, and both are taken at their user's word."""
    found = read_reference(stored(tmp_path / "r.npz", mu=numpy.ones(4, "f4")))
    assert found.whole.mu.dtype == torch.float64 and found.whole.n is None and found.meta == {}
    check_reference(found, EDM, "r")
    check_extractor(found, NETWORK, "r")


class Planted:
    def __reduce__(self):
        return (Path.touch, (Path("ran"),))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mu": None}, "lacks mu; it holds sigma"),
        ({"sigma": None}, "lacks sigma"),
        ({"sigma": numpy.eye(5)}, r"should be \[D\], \[D, D\]"),
        ({"mu": numpy.array([0, 0, numpy.nan, 0])}, "not finite"),
        ({"sigma": numpy.diag([1, numpy.inf, 1, 1])}, "not finite"),
        ({"sigma": numpy.triu(numpy.ones((4, 4)))}, "not symmetric"),
        ({"features": numpy.zeros((3, 5))}, r"features \(3, 5\)"),
        ({"features": numpy.full((3, 4), numpy.nan)}, "features hold numbers that are not finite"),
        ({"meta": numpy.array("{")}, "meta is no JSON"),
        ({"mu_art": numpy.zeros(4)}, "lacks sigma_art"),
        ({"mu": numpy.array([Planted()] * 4, dtype=object)}, "without unpickling"),
    ],
    ids=["mu", "sigma", "shape", "nan", "inf", "symmetry", "features", "features-nan", "meta", "part", "pickled"],
)
def test_odd_files_are_refused(tmp_path, monkeypatch, changes, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        read_reference(stored(tmp_path / "r.npz", **changes))
    assert not Path("ran").exists()


def test_a_pickle_is_not_opened(tmp_path, monkeypatch):
    """EDM2's references are pickles; a file may call itself anything."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.npz").write_bytes(pickle.dumps(Planted()))
    with pytest.raises(ValueError, match="no npz file; a pickle is not read"):
        read_reference(tmp_path / "r.npz")
    assert not Path("ran").exists()
    with pytest.raises(FileNotFoundError, match="fewstep reference FOLDER"):
        read_reference(tmp_path / "nowhere.npz")


def test_a_cut_off_file_is_refused(tmp_path):
    path = stored(tmp_path / "r.npz")
    data = bytearray(path.read_bytes())
    data[120] ^= 255
    path.write_bytes(data)
    with pytest.raises(ValueError, match="damaged"):
        read_reference(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "dinov2"}, "of name inception, these samples by one of dinov2"),
        ({"sha256": "cd" * 32}, "of sha256 abab"),
        ({"resize": "clean-bicubic"}, "of resize tf1-bilinear"),
    ],
)
def test_features_of_another_network_are_refused(change, message):
    """Mutation: only the number of features is compared, and both Inceptions have 2048."""
    with pytest.raises(ValueError, match=message):
        check_extractor(made(), replace(NETWORK, **change), "r.npz")


def test_features_of_another_number_are_refused():
    with pytest.raises(ValueError, match=r"r\.npz has 4 features, inception has 2048"):
        check_extractor(made(meta={}), replace(NETWORK, dim=2048), "r.npz")


def test_a_reference_of_another_protocol_is_refused():
    """Crop and resize differ, which nothing in mu and sigma shows."""
    with pytest.raises(ValueError, match=r"is of protocol edm-fid50k .*, not of dmd2-coco30k"):
        check_reference(made(), PROTOCOLS["dmd2-coco30k"], "r.npz")
    with pytest.raises(ValueError, match="lacks the categories art"):
        protocol = replace(EDM, categories=("art",))
        check_reference(made(meta=meta_of(protocol, NETWORK)), protocol, "r.npz")


def test_too_few_images_are_refused_where_the_covariance_must_be_regular():
    with pytest.raises(ValueError, match=r"4 images for 4 features.*at least 5"):
        check_enough(4, 4, EDM, "r")
    check_enough(5, 4, EDM, "r")
    check_enough(4, 4, FASHION, "r")
    check_enough(4, 4, PROTOCOLS["cmmd-coco30k"], "r")
    with pytest.raises(ValueError, match="4 images for 4 features"):
        check_reference(made(whole=Gaussian(torch.zeros(4), torch.eye(4), 4)), EDM, "r")


def test_a_reference_is_never_written_over(tmp_path):
    with pytest.raises(ValueError, match=r"should end in \.npz"):
        write_reference(made(), tmp_path / "r.npy")
    write_reference(made(), tmp_path / "r.npz")
    with pytest.raises(FileExistsError, match="choose another"):
        write_reference(made(), tmp_path / "r.npz")
