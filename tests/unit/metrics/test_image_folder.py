"""Claims about pictures as a protocol takes them; PIL and arithmetic by hand as oracles."""

from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from fewstep.metrics.image_folder import batches, check_sizes, image_files, prepared, prepared_tensor
from fewstep.metrics.protocols import PROTOCOLS

EDM, COCO, PATCH = (PROTOCOLS[name] for name in ("edm-fid50k", "dmd2-coco30k", "dmd2-sdxl-coco10k-patch"))


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(numpy.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=numpy.uint8))


def pixels(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(numpy.array(image)).permute(2, 0, 1)


def test_without_a_crop_the_bytes_are_those_of_the_file(tmp_path):
    """In the order of the names, in any batch size, grey and transparent ones as colour."""
    images = [picture(5, 7, seed) for seed in range(4)]
    images[1] = images[1].convert("L")
    images[2].putalpha(9)
    for i, image in enumerate(images):
        image.save(tmp_path / f"{3 - i}.png")
    (tmp_path / "prompts.txt").write_text("a bag\n")
    files = image_files(tmp_path, EDM)
    expected = torch.stack([pixels(image.convert("RGB")) for image in reversed(images)])
    check_sizes(files, EDM)
    for batch_size in (1, 3, 9):
        assert_close(torch.cat(list(batches(files, EDM, 3, batch_size))), expected, rtol=0, atol=0)
    assert next(batches(files, EDM, 1, 4)).shape == (4, 1, 7, 5)


@pytest.mark.parametrize(("width", "height", "box"), [(9, 4, (2, 0, 6, 4)), (4, 9, (0, 2, 4, 6)), (7, 4, (2, 0, 6, 4))])
def test_the_middle_is_as_long_as_the_shorter_edge(width, height, box):
    """A gap of 2.5 or 1.5 goes to the even 2; mutations: the corner, width and height exchanged."""
    image = picture(width, height)
    found = prepared(image, replace(COCO, size=3), 3)
    assert_close(found, pixels(image.crop(box).resize((3, 3), Image.Resampling.LANCZOS)), rtol=0, atol=0)


def test_another_rounding_and_filter_make_other_pictures():
    """CMMD's: the gap of 1.5 goes down to 1, and PIL's bicubic."""
    image = picture(7, 4)
    found = prepared(image, replace(PROTOCOLS["cmmd-coco30k"], size=3), 3)
    assert_close(found, pixels(image.crop((1, 0, 5, 4)).resize((3, 3), Image.Resampling.BICUBIC)), rtol=0, atol=0)


def test_a_patch_is_the_middle_unresized():
    """Mutation: resized to 299, which hides what the patch is to show."""
    image = picture(321, 305)
    assert_close(prepared(image, PATCH, 3), pixels(image.crop((11, 3, 310, 302))), rtol=0, atol=0)


def test_samples_are_prepared_as_their_files_would_be():
    image = picture(9, 4)
    found = prepared_tensor(pixels(image)[None], replace(COCO, size=3), 3)
    assert_close(found[0], prepared(image, replace(COCO, size=3), 3), rtol=0, atol=0)
    grey = prepared_tensor(torch.full((2, 1, 32, 32), 7, dtype=torch.uint8), PROTOCOLS["fashion-fmd"], 1)
    assert grey.shape == (2, 1, 32, 32) and bool((grey == 7).all())


def test_categories_are_subfolders(tmp_path):
    protocol = replace(EDM, categories=("art", "food"))
    for name in ("art", "food"):
        (tmp_path / name).mkdir()
    picture(4, 4).save(tmp_path / "food" / "0.png")
    with pytest.raises(ValueError, match=r"no image in .*art.*subfolders art, food"):
        image_files(tmp_path, protocol)
    picture(4, 4).save(tmp_path / "art" / "1.jpg")
    assert [path.parent.name for path in image_files(tmp_path, protocol)] == ["art", "food"]


def cut_off(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


@pytest.mark.parametrize(
    ("protocol", "sizes", "message"),
    [
        (EDM, [(8, 8), (8, 9)], r"1\.png is 8x9 and .*0\.png is 8x8: edm-fid50k crops nothing"),
        (PROTOCOLS["mjhq30k"], [(512, 512)], r"512x512: mjhq30k takes 1024x1024"),
        (PATCH, [(400, 298)], r"400x298: dmd2-sdxl-coco10k-patch takes the middle 299x299"),
    ],
    ids=["mixed", "size", "small"],
)
def test_sizes_that_a_protocol_does_not_take_are_refused(tmp_path, protocol, sizes, message):
    files = [tmp_path / f"{i}.png" for i in range(len(sizes))]
    for path, size in zip(files, sizes):
        picture(*size).save(path)
    with pytest.raises(ValueError, match=message):
        check_sizes(files, protocol)


def test_mixed_sizes_are_taken_where_they_are_cropped(tmp_path):
    files = [tmp_path / "0.png", tmp_path / "1.png"]
    picture(8, 9).save(files[0])
    picture(20, 5).save(files[1])
    check_sizes(files, COCO)
    assert next(batches(files, COCO, 3, 2)).shape == (2, 3, 256, 256)


def test_damaged_pictures_are_named(tmp_path):
    """One that has no header, and one that is cut off behind it, which PIL finds only when it decodes."""
    path = tmp_path / "0.png"
    picture(64, 64).save(path)
    cut_off(path)
    check_sizes([path], EDM)
    with pytest.raises(ValueError, match=r"0\.png is damaged"):
        next(batches([path], EDM, 3, 1))
    path.write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"0\.png is no image"):
        check_sizes([path], EDM)


def test_an_empty_folder_is_refused(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ValueError, match=r"no image in .*\.png, \.jpg, \.jpeg, \.webp are read"):
        image_files(tmp_path, EDM)
    with pytest.raises(FileNotFoundError, match="no folder of images at"):
        image_files(tmp_path / "nowhere", EDM)
