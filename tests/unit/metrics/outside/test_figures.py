"""Claims about the figures: each is the mean that its benchmark publishes, over the pictures that it means."""

import pytest

from fewstep.metrics.means import Mean
from fewstep.metrics.outside.contract import Answer, Item
from fewstep.metrics.outside.figures import STYLES, TASKS, geneval, hpsv2, imagereward, plain, vbench_figures
from fewstep.metrics.vbench import RANGES


def items_of(key: str, groups: dict[str, int]) -> list[Item]:
    """So many of each group, two of a prompt."""
    return [
        Item(f"{name}/{i}.png", f"{name} {i // 2}", i % 2, {key: name}) for name, n in groups.items() for i in range(n)
    ]


def scored(items, values) -> Answer:
    return Answer({item.file: float(value) for item, value in zip(items, values)}, 1.0)


def test_geneval_is_the_mean_of_six_accuracies():
    """Mutation: the mean over pictures, where a task of many counts more."""
    items = items_of("tag", {"single_object": 8, **{task: 4 for task in TASKS[1:]}})
    right = [1] * 8 + [1, 0, 0, 0] + [1, 1, 0, 0] + [1, 1, 1, 0] + [0] * 4 + [1] * 4
    found = geneval("GenEval", items, scored(items, right))
    accuracies = dict(zip(TASKS, [1.0, 0.25, 0.5, 0.75, 0.0, 1.0]))
    assert {name: mean.value for name, mean in found.items()} == pytest.approx(
        {"GenEval": sum(accuracies.values()) / 6} | {f"GenEval {task}": a for task, a in accuracies.items()}
    )
    error = (0.25**2 + 0.5**2 + 0.25**2) ** 0.5 / 6  # two prompts each, whose means differ by 0.5, 1 and 0.5
    assert found["GenEval"].error == pytest.approx(error)


def test_geneval_refuses_what_makes_no_mean_of_six():
    """Mutation: the mean over the tasks that are there."""
    items = items_of("tag", {task: 4 for task in TASKS if task not in ("colors", "position")})
    with pytest.raises(ValueError, match="mean of six tasks; no picture of colors, position"):
        geneval("GenEval", items, scored(items, [1] * 16))
    items = items_of("tag", {task: 4 for task in (*TASKS, "texture")})
    with pytest.raises(ValueError, match="no task texture; it has single_object"):
        geneval("GenEval", items, scored(items, [1] * 28))
    with pytest.raises(ValueError, match=r"correct \(1\) or not \(0\), and 'single_object/0.png' has 0.5"):
        geneval("GenEval", items, scored(items, [0.5] * 28))


def test_hpsv2_is_100_cos_of_all_pictures_and_of_each_style():
    items = items_of("style", dict.fromkeys(STYLES, 4))
    cosines = [0.2, 0.2, 0.3, 0.3] + [0.25] * 4 + [0.3] * 4 + [0.1, 0.3, 0.1, 0.3]
    found = hpsv2("HPSv2.1", items, scored(items, cosines))
    assert [found[f"HPSv2.1 {style}"].value for style in STYLES] == pytest.approx([25, 25, 30, 20])
    assert found["HPSv2.1"].value == pytest.approx(25)
    assert found["HPSv2.1 anime"].error == pytest.approx(5) and found["HPSv2.1 photo"].error == pytest.approx(0)
    assert found["HPSv2.1"].error == pytest.approx(5 / 4)  # no error from the styles' differences


def test_hpsv2_without_styles_has_one_figure():
    items = [Item("a.png", "a cat"), Item("b.png", "a dog")]
    assert set(hpsv2("HPSv2.1", items, scored(items, [0.2, 0.3]))) == {"HPSv2.1"}


def test_imagereward_is_the_mean_with_its_error_by_prompt():
    items = items_of("", {"all": 4})
    found = imagereward("ImageReward", items, scored(items, [-1, 0, 1, 2]))
    assert found == {"ImageReward": Mean(0.5, pytest.approx(1.0))}  # the prompts' means are -0.5 and 1.5


def test_vbench_is_made_of_the_packages_figures():
    """In percent, under the names of the leaderboard. Mutation: means of the videos' scores."""
    items = [Item("a cat-0.mp4", "a cat")]
    answer = Answer(
        {"a cat-0.mp4": {"color": 0.1}}, 1.0, {n.replace(" ", "_"): high for n, (_, high) in RANGES.items()}
    )
    found = vbench_figures("VBench", items, answer)
    assert [found[name].value for name in ("VBench", "VBench quality", "VBench semantic")] == pytest.approx([100] * 3)
    assert found["VBench scene"].value == pytest.approx(82.22) and len(found) == 3 + len(RANGES)
    with pytest.raises(ValueError, match="scene missing"):
        vbench_figures("VBench", items, Answer({}, 1.0, {n: 1.0 for n in RANGES if n != "scene"}))


def test_results_of_other_videos_are_not_vbench():
    """Mutation: a folder of many and results of few pass, since a video may have no score."""
    items = [Item(f"{i}-0.mp4", str(i)) for i in range(1000)]
    figures = {name: 0.5 for name in RANGES}
    for scored_ones in (575, 574):
        scores = {item.file: {"scene": 1.0} if i < scored_ones else {} for i, item in enumerate(items)}
        if scored_ones == 575:
            assert "VBench" in vbench_figures("VBench", items, Answer(scores, 1.0, figures))
            continue
        with pytest.raises(ValueError, match="scored 574 of 1000 videos"):
            vbench_figures("VBench", items, Answer(scores, 1.0, figures))


def test_a_users_scores_have_a_mean_each():
    """A file that lacks a name does not count for it, and the adapter's own figures stand as they are."""
    items = [Item("a", "x"), Item("b", "x"), Item("c", "y")]
    assert plain("mine", items, scored(items, [1, 3, 5]))["mine"].value == 3.0
    answer = Answer({"a": {"p": 1.0}, "b": {"p": 2.0, "q": 4.0}, "c": {}}, 1.0, {"q": 7.0})
    found = plain("mine", items, answer)
    assert found["mine p"].value == 1.5 and found["mine q"] == Mean(7.0, None)
    with pytest.raises(ValueError, match="neither scores nor figures"):
        plain("mine", items, Answer({"a": {}, "b": {}, "c": {}}, 1.0))


def test_scores_by_name_are_no_single_score():
    items = [Item("a", "x")]
    with pytest.raises(ValueError, match="one number is wanted for 'a', not p"):
        imagereward("ImageReward", items, Answer({"a": {"p": 1.0}}, 1.0))
