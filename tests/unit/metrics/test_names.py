"""How figures stand in tables."""

import pytest

from fewstep.metrics.names import best_rows, better, heading
from fewstep.metrics.protocols import PROTOCOLS, figure_name


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("verified", [True, False])
@pytest.mark.parametrize("figure, way", [("frechet", "lower"), ("kid", "lower"), ("inception_score", "higher")])
def test_every_name_of_a_figure_has_its_direction(protocol, verified, figure, way):
    """Mutation: only the published names have one, and FID@5000 is never bold."""
    for n in (PROTOCOLS[protocol].count, 17):
        assert better(figure_name(figure, PROTOCOLS[protocol], n, verified=verified)) == way


def test_parts_go_as_their_whole_and_strangers_have_no_direction():
    assert better("GenEval counting@80") == "higher" and better("FID animals@30") == "lower"
    assert better("seconds") is None and heading("seconds") == "seconds"
    assert heading("patch FID@500") == "patch FID@500 ↓"
    assert best_rows("FID", [{"FID": 3.0}, {"FID": 2.0}, {}]) == [1]
