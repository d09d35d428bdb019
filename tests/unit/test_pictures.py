"""Bytes, sizes and places of pictures."""

import pytest
import torch
from PIL import Image

from fewstep.metrics.features import quantise
from fewstep.pictures import PAPER, panel, picture, save, scatter, side_by_side


def test_ends_and_middle_become_their_bytes():
    """Fails with 127.5 x + 127.5: 0 becomes 127."""
    x = torch.tensor([-1.0, 1.0, 0.0, -9.0, 9.0, -1 / 127.5])
    assert quantise(x).tolist() == [0, 255, 128, 0, 255, 127]


def test_every_byte_survives_the_round_trip():
    """A picture that is read, shown and read again stays what it is."""
    values = torch.arange(256)
    assert quantise(values / 127.5 - 1).tolist() == values.tolist()


def test_rows_of_a_picture_run_down_and_columns_across():
    image = torch.full((1, 2, 3), -1.0)
    image[0, 0, 2] = 1.0
    assert [picture(image).getpixel((x, y)) for y in range(2) for x in range(3)] == [0, 0, 255, 0, 0, 0]


def test_enlarging_repeats_pixels():
    made = picture(torch.tensor([[[-1.0, 1.0]]]), scale=3)
    assert made.size == (6, 3)
    assert [made.getpixel((x, 1)) for x in range(6)] == [0, 0, 0, 255, 255, 255]


@pytest.mark.parametrize(("n", "columns", "size"), [(6, 3, (3 * 11 - 1, 2 * 9 - 1)), (7, 3, (3 * 11 - 1, 3 * 9 - 1))])
def test_panel_has_room_for_all_tiles_and_one_pixel_between(n, columns, size):
    assert panel(torch.zeros(n, 3, 4, 5), columns, scale=2).size == size


def test_panel_fills_row_by_row():
    images = torch.full((4, 1, 2, 2), -1.0)
    images[1] = 1.0
    made = panel(images, 2, scale=1)
    assert [made.getpixel(p) for p in ((0, 0), (3, 0), (0, 3))] == [(0, 0, 0), (255, 255, 255), (0, 0, 0)]


def test_points_are_drawn_where_they_are():
    """x to the right, y upwards."""
    made = scatter(torch.tensor([[0.5, 0.5]]), size=100, extent=1.0)
    assert made.getpixel((75, 25)) == (40, 90, 180)
    assert made.getpixel((75, 75)) == PAPER


@pytest.mark.parametrize("points", [torch.zeros(3, 2), torch.zeros(3, 1), torch.randn(3, 5)], ids=["zeros", "1d", "5d"])
def test_any_cloud_gives_a_picture(points):
    assert panel(points, 8).size == (256, 256)


def test_titles_and_labels_stand_beside_the_panels():
    tile = Image.new("RGB", (30, 20))
    bare, labelled = (side_by_side([("a", tile), ("b", tile)], rows) for rows in ((), ("first", "second")))
    assert labelled.width > bare.width >= 60
    assert labelled.height == bare.height > 20


def test_save_makes_the_folder(tmp_path):
    path = save(Image.new("L", (3, 2)), tmp_path / "new" / "x.png")
    assert Image.open(path).size == (3, 2)
