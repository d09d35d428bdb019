"""Claims about the items: a picture gets its own prompt, whatever else is in the folder, and what is wrong is said."""

import json

import pytest

from fewstep.metrics.outside.figures import STYLES, TASKS
from fewstep.metrics.outside.items import by_name, in_order, of_lines, of_styles, of_tasks, of_videos


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")


@pytest.fixture
def styles(tmp_path):
    """A folder of prompts as HPSv2's: two of each style."""
    folder = tmp_path / "prompts"
    folder.mkdir()
    for style in STYLES:
        (folder / f"{style}.json").write_text(json.dumps([f"{style} one", f"{style} two"]))
    return folder


@pytest.fixture
def tasks(tmp_path):
    """A file of prompts as GenEval's: one of each task."""
    path = tmp_path / "evaluation_metadata.jsonl"
    path.write_text("".join(json.dumps({"tag": tag, "include": [], "prompt": f"a {tag}"}) + "\n" for tag in TASKS))
    return path


def test_a_missing_picture_moves_no_other(styles, tmp_path):
    """Mutation: prompts given in the order of the files, so that all after a gap get another's."""
    touch(tmp_path / "images", "anime/00001.jpg", "photo/00000.PNG", "photo/00001.png", "photo/notes.txt")
    found = {item.file: (item.prompt, item.extra["style"]) for item in by_name(tmp_path / "images", of_styles(styles))}
    assert found == {
        "anime/00001.jpg": ("anime two", "anime"),
        "photo/00000.PNG": ("photo one", "photo"),
        "photo/00001.png": ("photo two", "photo"),
    }


def test_geneval_has_four_pictures_of_a_prompt(tasks, tmp_path):
    """With all that its evaluator wants to know of a prompt; a grid beside the samples is none."""
    touch(tmp_path / "images", "00002/samples/0003.png", "00002/grid.png")
    (item,) = by_name(tmp_path / "images", of_tasks(tasks))
    assert (item.file, item.prompt, item.index) == ("00002/samples/0003.png", "a counting", 3)
    assert item.extra == {"tag": "counting", "include": [], "prompt": "a counting"}
    assert len(of_tasks(tasks)) == 4 * len(TASKS)


def test_lines_go_with_the_files_in_order(tmp_path):
    touch(tmp_path, "b.png", "a.webp", "c.jpg", "c.txt")
    found = in_order(tmp_path, of_lines(["a cat", "a dog", "a cat"]))
    assert [(i.file, i.prompt, i.index) for i in found] == [
        ("a.webp", "a cat", 0),
        ("b.png", "a dog", 0),
        ("c.jpg", "a cat", 1),
    ]
    with pytest.raises(ValueError, match="2 prompts for the 3 images"):
        in_order(tmp_path, of_lines(["a", "b"]))


def test_names_of_videos_are_their_prompts(tmp_path):
    """VBench reads five of a prompt; of flickering's 25 only the first."""
    touch(tmp_path, "a cat - in a hat-4.mp4", "a cat - in a hat-5.mp4", "a dog-0.gif", "notes.txt")
    found = [(i.file, i.prompt, i.index) for i in of_videos(tmp_path)]
    assert found == [("a cat - in a hat-4.mp4", "a cat - in a hat", 4), ("a dog-0.gif", "a dog", 0)]
    touch(tmp_path, "cat.mp4")
    with pytest.raises(ValueError, match=r"cat\.mp4 is not called PROMPT-NUMBER\.mp4"):
        of_videos(tmp_path)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ("a cat-0.gif", "are both number 0 of one prompt"),
        ("a cat-00.mp4", "is not called PROMPT-NUMBER"),
        ("a cat-\u0661.mp4", "is not called PROMPT-NUMBER"),
    ],
)
def test_a_video_is_there_once(tmp_path, other, words):
    """Mutations: two endings, or two spellings of a number (the last is Arabic's 1), are two draws of a prompt."""
    touch(tmp_path, "a cat-0.mp4", other)
    with pytest.raises(ValueError, match=words):
        of_videos(tmp_path)


def test_wrong_names_are_told(styles, tasks, tmp_path):
    """Mutation: a picture of another name is left out, and the figure is of the rest."""
    images = tmp_path / "images"
    images.mkdir()
    with pytest.raises(ValueError, match=r"no image in .* as anime/00000\.png"):
        by_name(images, of_styles(styles))
    touch(images, "anime/00000.png", "anime/2.png")
    with pytest.raises(ValueError, match=r"anime/2\.png belongs to no prompt; names are as anime/00000\.png"):
        by_name(images, of_styles(styles))
    touch(images, "00000/samples/0000.png", "00000/samples/0004.png")
    with pytest.raises(ValueError, match=r"0004\.png belongs to no prompt"):
        by_name(images, of_tasks(tasks))


def test_two_files_of_one_picture_are_refused(styles, tmp_path):
    touch(tmp_path / "images", "photo/00000.png", "photo/00000.jpg")
    with pytest.raises(ValueError, match="belongs to no prompt"):
        by_name(tmp_path / "images", of_styles(styles))


@pytest.mark.parametrize("text", ["{", "{}", "[1]"])
def test_prompts_that_are_none_are_refused(styles, tmp_path, text):
    (styles / "photo.json").write_text(text)
    with pytest.raises(ValueError, match=r"photo\.json is no"):
        of_styles(styles)
    (tmp_path / "tasks.jsonl").write_text(text + "\n")
    with pytest.raises(ValueError, match=r"tasks\.jsonl is no"):
        of_tasks(tmp_path / "tasks.jsonl")
    with pytest.raises(FileNotFoundError, match="no folder of prompts at"):
        of_styles(tmp_path / "nowhere")
