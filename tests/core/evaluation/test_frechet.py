"""The numerics, against scipy, against formulae that share nothing with ours, and against numbers known in advance."""

import numpy as np
import pytest
import scipy.linalg

from physformer_core.errors import DataError
from physformer_core.evaluation.frechet import (
    FeatureStatistics,
    Reservoir,
    RunningStatistics,
    frechet_distance,
    kernel_distance,
    load_statistics,
    paired_kernel_distance,
    precision_recall,
    save_statistics,
)


def features(seed, count, width=24, shift=0.0):
    random = np.random.default_rng(seed)
    mixing = random.standard_normal((width, width)) / width**0.5
    return (random.gamma(2.0, size=(count, width)) @ mixing + shift).astype(np.float32)


def moments(x):
    return x.mean(0, dtype=np.float64), np.cov(x.astype(np.float64), rowvar=False)


def test_streaming_equals_numpy_whatever_the_batches():
    x = features(0, 1001) + 1000  # a mean large against the spread: sums of squares would lose digits
    for sizes in ([1001], [1] * 11 + [990], [400, 0, 601], [37] * 27 + [2]):
        running, start = RunningStatistics(24), 0
        for size in sizes:
            running.update(x[start : start + size])
            start += size
        mean, covariance = moments(x)
        assert running.count == 1001
        np.testing.assert_allclose(running.mean, mean, rtol=1e-12)
        np.testing.assert_allclose(running.covariance(), covariance, rtol=1e-7, atol=1e-9)


def test_one_picture_has_no_covariance():
    running = RunningStatistics(3)
    running.update(np.ones((1, 3)))
    with pytest.raises(DataError, match="at least two pictures"):
        running.covariance()


@pytest.mark.parametrize("count", [400, 3000])
def test_frechet_distance_against_scipy(count):
    (mean_a, a), (mean_b, b) = moments(features(1, count)), moments(features(2, count, shift=0.3))
    root = scipy.linalg.sqrtm(a @ b)
    expected = ((mean_a - mean_b) ** 2).sum() + np.trace(a + b - 2 * root.real)
    assert frechet_distance(mean_a, a, mean_b, b) == pytest.approx(expected, abs=1e-4, rel=1e-6)


@pytest.mark.parametrize("count", [10, 400])  # fewer pictures than dimensions: singular, where sqrtm is at its worst
def test_frechet_distance_against_singular_values_of_the_features(count):
    x, y = features(3, count).astype(np.float64), features(4, count, shift=-0.2).astype(np.float64)
    centred_x, centred_y = x - x.mean(0), y - y.mean(0)
    # tr (A B)^1/2 is the nuclear norm of X Y^T / sqrt((n - 1)(m - 1)): no covariance is ever formed.
    overlap = np.linalg.svd(centred_x @ centred_y.T, compute_uv=False).sum() / (count - 1)
    spread = (centred_x**2).sum() / (count - 1) + (centred_y**2).sum() / (count - 1)
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + spread - 2 * overlap
    (mean_a, a), (mean_b, b) = moments(x), moments(y)
    assert frechet_distance(mean_a, a, mean_b, b) == pytest.approx(expected, abs=1e-4)


def test_known_distances():
    identity = np.eye(5)
    assert frechet_distance(np.zeros(5), identity, np.zeros(5), identity) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(np.zeros(5), identity, np.full(5, 2.0), identity) == pytest.approx(20)
    assert frechet_distance(np.zeros(5), 4 * identity, np.zeros(5), 9 * identity) == pytest.approx(5)  # (2 - 3)^2 each
    with pytest.raises(DataError, match="width 5 and 4"):
        frechet_distance(np.zeros(5), identity, np.zeros(4), np.eye(4))


def test_kid_against_sums_written_out():
    x, y = features(5, 12, width=6).astype(np.float64), features(6, 12, width=6, shift=0.5).astype(np.float64)

    def k(a, b):
        return (float(np.dot(a, b)) / 6 + 1) ** 3

    pairs = [(i, j) for i in range(12) for j in range(12)]
    within = sum(k(x[i], x[j]) + k(y[i], y[j]) for i, j in pairs if i != j) / (12 * 11)
    expected = within - 2 * sum(k(x[i], y[j]) for i, j in pairs) / 144
    mean, spread = kernel_distance(x, y)
    assert mean == pytest.approx(expected, rel=1e-9) and spread == 0


def test_kid_is_unbiased_and_repeatable():
    x = features(7, 4000)
    values = kernel_distance(x[:2000], x[2000:], subsets=20, subset_size=300, seed=1)
    apart = kernel_distance(x[:2000], features(7, 4000)[2000:] + 0.5, subsets=20, subset_size=300, seed=1)
    assert abs(values[0]) < 0.1 * apart[0] and values[1] > 0
    assert values == kernel_distance(x[:2000], x[2000:], subsets=20, subset_size=300, seed=1)


def test_precision_and_recall_of_known_shapes():
    random = np.random.default_rng(8)
    real = random.uniform(0, 1, (1500, 2))
    inside = random.uniform(0, 0.5, (1500, 2))  # a quarter of the real square
    precision, recall = precision_recall(real, inside)
    assert precision > 0.97 and recall == pytest.approx(0.25, abs=0.05)
    assert precision_recall(real, real + 10) == (0, 0)
    with pytest.raises(DataError, match="more than 3"):
        precision_recall(real[:3], real)


def test_a_reservoir_is_a_fair_sample():
    counts = np.zeros(40)
    for seed in range(300):
        reservoir = Reservoir(1, capacity=10, seed=seed)
        for start in range(0, 40, 7):
            reservoir.update(np.arange(start, min(start + 7, 40))[:, None])
        kept = reservoir.vectors()[:, 0].astype(int)
        assert len(set(kept)) == 10
        counts[kept] += 1
    assert counts.min() > 45 and counts.max() < 110  # 75 each, spread 7.5


def test_statistics_files_are_as_pytorch_fid_reads_them(tmp_path):
    mean, covariance = moments(features(9, 100))
    path = tmp_path / "s.npz"
    save_statistics(path, FeatureStatistics(mean, covariance, 100, {"extractor": {"name": "tiny"}}))
    with np.load(path) as archive:  # pytorch-fid: f["mu"][:], f["sigma"][:]
        np.testing.assert_array_equal(archive["mu"][:], mean)
        np.testing.assert_array_equal(archive["sigma"][:], covariance)
    again = load_statistics(path)
    assert again.count == 100 and again.recipe == {"extractor": {"name": "tiny"}} and again.vectors is None
    np.savez(tmp_path / "theirs.npz", mu=mean, sigma=covariance)
    theirs = load_statistics(tmp_path / "theirs.npz")
    assert theirs.count is None and theirs.recipe == {}


@pytest.mark.parametrize("content", ["text", "empty", "pickle", "shape", "nan", "keys"])
def test_a_damaged_statistics_file_is_told(tmp_path, content):
    path = tmp_path / "s.npz"
    mean, covariance = np.zeros(3), np.eye(3)
    if content == "text":
        path.write_text("text")
    elif content == "empty":
        path.write_bytes(b"")
    elif content == "pickle":
        np.savez(path, mu=np.array([{}], dtype=object), sigma=covariance)
    elif content == "shape":
        np.savez(path, mu=mean, sigma=np.eye(4))
    elif content == "nan":
        np.savez(path, mu=mean, sigma=covariance * np.nan)
    else:
        np.savez(path, mu=mean)
    with pytest.raises(DataError, match=r"damaged|holds no feature statistics"):
        load_statistics(path)


def test_paired_kid_without_a_pair_is_that_of_the_others():
    x, y = features(8, 40), features(9, 40) + 0.2
    value, without = paired_kernel_distance(x, y)
    assert value == pytest.approx(kernel_distance(x, y)[0], rel=0.05)  # pairs that have nothing in common
    for pair in (0, 17, 39):
        rest = np.arange(40) != pair
        assert without[pair] == pytest.approx(paired_kernel_distance(x[rest], y[rest])[0])
    with pytest.raises(DataError, match="three at least"):
        paired_kernel_distance(x[:2], y[:2])
    with pytest.raises(DataError, match="not 40 and 39"):
        paired_kernel_distance(x, y[:39])


def test_paired_kid_of_two_sets_alike_is_zero_however_alike_pairs_are():
    """Pairs are pictures of one prompt, which have more in common than pictures of two."""
    random = np.random.default_rng(3)
    paired, plain = [], []
    for _ in range(60):
        prompts = random.standard_normal((30, 8))
        x, y = (prompts + 0.5 * random.standard_normal(prompts.shape) for _ in range(2))
        paired.append(paired_kernel_distance(x, y)[0])
        plain.append(kernel_distance(x, y)[0])
    error = np.std(paired) / len(paired) ** 0.5
    assert abs(np.mean(paired)) < 3 * error < 0.05
    assert np.mean(plain) < -0.1
