import numpy as np
import pytest

from physformer_core.evaluation.effort import Effort, distances, draw_efforts, knee
from physformer_core.evaluation.prompt_accuracy import Share


def effort(steps, hits, count=100, above=0.0):
    share = Share.of([number < hits for number in range(count)])
    return Effort(
        steps=steps,
        evaluations=2 * steps,
        seconds=0.1 * steps,
        top1=Share.of([True, False]),
        top5=share,
        distance=0.02 + above,
        beyond_least=(above, 0.005),
    )


def test_the_knee_is_the_fewest_that_are_as_good_as_the_best():
    tried = [effort(3, 20), effort(6, 47), effort(10, 50), effort(20, 51)]
    assert knee(tried).steps == 6  # one standard error of 51 of 100 is 5
    assert knee(tried[::-1]).steps == 6
    assert knee([effort(3, 20), effort(20, 90)]).steps == 20
    assert knee([effort(9, 0), effort(4, 0)]).steps == 4


def test_the_knee_is_as_near_to_real_scenes_as_the_nearest():
    tried = [effort(3, 50, above=0.02), effort(6, 50, above=0.006), effort(10, 50, above=0.004), effort(20, 50)]
    assert knee(tried).steps == 10
    # None is both accurate and near: what is nearest.
    assert knee([effort(3, 90, above=0.02), effort(6, 20, above=0.0)]).steps == 6


def test_distances_grow_with_what_pictures_have_in_common():
    random = np.random.default_rng(0)
    real = random.normal(size=(60, 12))
    near, far = real + 0.1 * random.normal(size=real.shape), 0.5 * real
    (d_near, (none, exact)), (d_far, (above, error)) = distances(real, [near, far])
    assert none == exact == 0.0, "the least is no distance beyond itself"
    assert above == pytest.approx(d_far - d_near) and 0 < error < above
    # The error is that of the difference: over other prompts it varies by about so much.
    differences = []
    for _ in range(200):
        real = random.normal(size=(60, 12))
        near, far = real + 0.1 * random.normal(size=real.shape), 0.5 * real
        one, other = distances(real, [near, far])
        differences.append(other[0] - one[0])
    assert 0.5 < error / np.std(differences) < 2


@pytest.mark.parametrize(
    "tried",
    [[effort(5, 30)], [effort(3, 0), effort(9, 100)], [effort(n, 5 * n, above=0.4 / n) for n in (2, 5, 20)]],
)
def test_the_plot_has_lines_and_the_knee(tried):
    picture = draw_efforts(tried)
    pixels = np.asarray(picture).reshape(-1, 3).astype(int)
    assert picture.size == (900, 760)
    for colour in ((208, 98, 20), (31, 92, 173), (60, 130, 70)):
        assert (np.abs(pixels - colour).max(1) < 12).sum() > 30
