"""The classifier that judges pictures: what it learns from scenes, and what is kept of it."""

import numpy as np
import pytest

from physformer_core.data.scenes import compose_scene, concept_named, render_svg
from physformer_core.errors import OutputError
from physformer_core.evaluation import classifier as classifier_module
from physformer_core.evaluation.classifier import ConceptClassifier, fit_classifier, load_classifier
from physformer_core.evaluation.features import load_extractor

NAMES = ("cat", "car", "tree", "house", "apple", "dragon")
SOME = tuple(concept_named(name) for name in NAMES)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "physformer"


def scenes(seed=9, **options):
    """Scenes of each of the names that the classifier has not seen."""
    return [
        render_svg(compose_scene(seed, number, aspect=1.0, concept=name, **options).svg, 96, 96)
        for number, name in enumerate(NAMES)
    ]


def test_it_is_kept_under_a_key_of_all_it_depends_on(tiny_extractor, few_views, cache, monkeypatch):
    seen, steps = [], []
    first = load_classifier(
        tiny_extractor, concepts=SOME[:3], progress=lambda *done: seen.append(done), fitting=lambda *n: steps.append(n)
    )
    assert seen[0] == (0, 12) and seen[-1] == (12, 12) and first.weights_cd.shape == (4, 193)
    assert steps[0][0] == 0 and steps[-1][0] == steps[-1][1] and sorted(steps) == steps
    again = load_classifier(tiny_extractor, concepts=SOME[:3], progress=lambda *_: pytest.fail("fitted again"))
    np.testing.assert_array_equal(first.weights_cd, again.weights_cd)
    (kept,) = cache.glob("classifier-*.npy")
    assert first.key == again.key and kept.name == f"classifier-{first.key[:32]}.npy"
    whole = kept.read_bytes()
    for damage in (b"half", b"", whole[:-7]):
        kept.write_bytes(damage)
        np.testing.assert_array_equal(load_classifier(tiny_extractor, concepts=SOME[:3]).weights_cd, first.weights_cd)
        assert kept.read_bytes() == whole


@pytest.mark.parametrize(
    ("name", "value"),
    [("VIEWS", ("single",)), ("SIDES", (32,)), ("CLASSIFIER_SEED", 1), ("WINDOW_SIDES", (0.5,)), ("SCENES_VERSION", 0),
     ("_WEIGHT_DECAY", 0.1), ("_BLUR", (0.0, 1.0)), ("_BENT", (0.0, 1.0))],
)  # fmt: skip
def test_another_recipe_has_another_key(tiny_extractor, few_views, monkeypatch, name, value):
    before = classifier_module._key(tiny_extractor, SOME)
    assert before != classifier_module._key(tiny_extractor, SOME[:-1])
    monkeypatch.setattr(classifier_module, name, value)
    assert before != classifier_module._key(tiny_extractor, SOME)


def test_another_network_has_another_key(tiny_extractor, monkeypatch):
    before = classifier_module._key(tiny_extractor, SOME)
    monkeypatch.setattr(tiny_extractor, "fingerprint", "0" * 64)
    assert before != classifier_module._key(tiny_extractor, SOME)


def test_what_cannot_be_kept_is_told(tiny_extractor, few_views, monkeypatch):
    def refuse(path):
        raise OutputError(f"cannot write {path}")

    monkeypatch.setattr(classifier_module, "atomic_write", refuse)
    told = []
    found = load_classifier(tiny_extractor, concepts=SOME[:2], notify=told.append)
    assert found.weights_cd.shape == (3, 193) and "could not be kept" in told[0]


def test_two_fits_are_the_same_bits(tiny_extractor, few_views):
    first, second = (fit_classifier(tiny_extractor, concepts=SOME) for _ in range(2))
    assert first.weights_cd.tobytes() == second.weights_cd.tobytes() and first.weights_cd.any(1).all()


def test_the_fit_is_at_its_minimum():
    """The gradient of both regressions vanishes: the biases' is the mean of what is predicted less what is so."""
    random = np.random.default_rng(0)
    units, labels = random.normal(size=(60, 8)).astype(np.float32), random.integers(0, 3, 60)
    units /= np.linalg.norm(units, axis=1, keepdims=True)
    caged = units[:, 0] + random.normal(size=60) / 3 > 0.4
    weights = classifier_module._fit(units, labels, caged, 3, None)
    found = ConceptClassifier(SOME[:3], weights, "")
    shares = np.bincount(labels, minlength=3) / 60
    np.testing.assert_allclose(np.exp(found.scores(units)).mean(0), shares, atol=1e-3)
    probabilities = np.exp(found.caged_scores(units))
    assert probabilities[:, 3:].sum(1).mean() == pytest.approx(caged.mean(), abs=1e-3)
    np.testing.assert_allclose(probabilities.sum(1), 1, rtol=1e-5)
    np.testing.assert_allclose(probabilities[:, :3] + probabilities[:, 3:], np.exp(found.scores(units)), rtol=1e-4)


def test_what_is_equal_stays_equal():
    nothing = ConceptClassifier(SOME, np.zeros((7, 193), np.float32), "")
    features = np.ones((2, 192), np.float32)
    assert len(np.unique(nothing.scores(features))) == len(np.unique(nothing.caged_scores(features))) == 1


def test_each_view_shows_what_it_is_labelled_with(few_views):
    rows = {name: row for row, name in enumerate(NAMES)}
    for row, name in enumerate(NAMES):
        for number, view in enumerate(classifier_module.VIEWS[:3]):
            plain, worse = classifier_module._windows(SOME, rows, row, number)
            assert plain.row == worse.row == row and plain.caged == worse.caged == (view == "caged")
            assert plain.picture.shape == worse.picture.shape and (plain.picture != worse.picture).any(), name
    # Of pairs the composer picks both things; those that are not asked about are left out.
    all_rows = {concept.name: number for number, concept in enumerate(classifier_module.load_concepts())}
    assert len(classifier_module._windows(SOME, all_rows, 0, 3)) == 4
    assert all(
        window.row in rows.values()
        for row in rows.values()
        for window in classifier_module._windows(SOME, rows, row, 3)
    )


def test_an_unsteady_hand_bends_and_smears(monkeypatch):
    lines = np.indices((128, 128)).sum(0) // 8 % 2 * 255
    picture = np.repeat(lines[..., None], 3, axis=2).astype(np.uint8)

    def worse(**amounts):
        for name in ("_BENT", "_SMEAR", "_BLUR", "_NOISE"):
            monkeypatch.setattr(classifier_module, name, (amounts.get(name, 0),) * 2)
        return classifier_module._worse(picture, 1.0, np.random.default_rng(3)).astype(int)

    assert np.abs(worse() - picture).mean() < 1  # parts that are not moved are interpolated all the same
    bent = worse(_BENT=3)
    assert np.abs(bent[0] - picture[0]).mean() < 10, "the edge stays where it is"
    assert 10 < np.abs(bent - picture).mean() < 100 and np.ptp(bent[40:90, 40:90]) > 250
    smeared = np.abs(worse(_SMEAR=4) - picture).mean(2)
    assert 0.1 < (smeared < 1).mean() < 0.9, "in places, not everywhere"
    assert np.abs(worse(_SMEAR=4) - worse(_SMEAR=4)).max() == 0


def test_efficientnet_names_real_scenes_and_sees_cages(monkeypatch):
    monkeypatch.setattr(classifier_module, "VIEWS", ("single", "setting", "setting", "caged", "caged"))
    monkeypatch.setattr(classifier_module, "SIDES", (128,))
    extractor = load_extractor("efficientnet")
    found = fit_classifier(extractor, concepts=SOME)
    assert [found.index(name) for name in NAMES] == list(range(6))
    plain = extractor.extract([*scenes(kind="single"), *scenes(kind="setting")])
    caged = extractor.extract(scenes(relation="in"))
    assert found.scores(plain).argmax(1).tolist() == [*range(6)] * 2
    assert found.caged_scores(plain).argmax(1).tolist() == [*range(6)] * 2
    best = found.caged_scores(caged).argmax(1)
    assert best.min() >= 6 and np.sum(best == range(6, 12)) >= 5  # bars hide much of an apple
