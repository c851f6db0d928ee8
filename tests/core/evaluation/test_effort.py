import numpy as np
import pytest

from physformer_core.evaluation.effort import Effort, draw_efforts, knee
from physformer_core.evaluation.prompt_accuracy import Share


def effort(steps, hits, count=100):
    share = Share.of([number < hits for number in range(count)])
    return Effort(steps=steps, evaluations=2 * steps, seconds=0.1 * steps, top1=Share.of([True, False]), top5=share)


def test_the_knee_is_the_fewest_that_are_as_good_as_the_best():
    tried = [effort(3, 20), effort(6, 47), effort(10, 50), effort(20, 51)]
    assert knee(tried).steps == 6  # one standard error of 51 of 100 is 5
    assert knee(tried[::-1]).steps == 6
    assert knee([effort(3, 20), effort(20, 90)]).steps == 20
    assert knee([effort(9, 0), effort(4, 0)]).steps == 4


@pytest.mark.parametrize(
    "tried", [[effort(5, 30)], [effort(3, 0), effort(9, 100)], [effort(n, 5 * n) for n in (2, 5, 20)]]
)
def test_the_plot_has_lines_and_the_knee(tried):
    picture = draw_efforts(tried)
    pixels = np.asarray(picture).reshape(-1, 3).astype(int)
    assert picture.size == (900, 520)
    for colour in ((208, 98, 20), (31, 92, 173)):
        assert (np.abs(pixels - colour).max(1) < 12).sum() > 30
