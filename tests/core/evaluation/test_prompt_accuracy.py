"""Prompt accuracy where the answer is known: real scenes must be right, pictures of nothing must be at the floor."""

import numpy as np
import pytest

from physformer_core.data.scenes import load_concepts, render_svg
from physformer_core.evaluation.classifier import ConceptClassifier, load_classifier
from physformer_core.evaluation.prompt_accuracy import (
    Judge,
    Share,
    judge_all,
    judged_table,
    relation_report,
    single_report,
)
from physformer_core.evaluation.prompt_cases import relation_cases, single_cases
from physformer_core.evaluation.prompt_sheet import prompt_sheet


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def judge(tiny_extractor, few_views):
    return Judge(tiny_extractor, load_classifier(tiny_extractor))


def test_real_scenes_reach_the_ceiling_and_noise_the_floor(judge):
    concepts = judge.concepts
    cases = [case for case in single_cases(60, 3, aspect=1.0) if case.kind == "plain"]
    real = [(number, render_svg(case.scene.svg, 48, 48)) for number, case in enumerate(cases)]
    judged = judge_all(cases, iter(real), judge)
    report = single_report(judged, concepts)
    assert report["count"] == 30 and report["top1"]["value"] == report["ceiling"]["top1"]
    assert report["top5"]["value"] > 0.2 > 5 * report["floor"]["top5"]  # even by pictures of 8 x 8
    assert sum(row["top1"]["count"] for row in report["categories"]) == 30 and list(report["kinds"]) == ["plain"]

    random = np.random.default_rng(0)
    noise = [(number, random.integers(0, 256, (48, 48, 3), dtype=np.uint8)) for number in range(30)]
    report = single_report(judge_all(cases, iter(noise), judge), concepts)
    assert report["top5"]["value"] < 0.1 and report["ceiling"]["top5"] > 0.2


def test_the_floor_is_what_shuffling_gives_on_average(judge):
    cases = [case for case in single_cases(24, 4, aspect=1.0) if case.kind == "plain"]
    judged = judge_all(cases, iter([(n, render_svg(case.scene.svg, 32, 32)) for n, case in enumerate(cases)]), judge)
    hits = [
        [np.sum(one.drawn.scores > one.drawn.scores[other.case.subject]) < 5 for other in judged if other is not one]
        for one in judged
    ]
    assert single_report(judged, judge.concepts)["floor"]["top5"] == pytest.approx(np.mean(hits))


@pytest.mark.parametrize("aspect", [1.0, 16 / 9])
def test_relations(judge, aspect):
    cases = relation_cases(14, 1, aspect=aspect)
    height, width = (64, 64) if aspect == 1 else (54, 96)
    real = [(number, render_svg(case.scene.svg, width, height)) for number, case in enumerate(cases)]
    judged = judge_all(cases, iter(real), judge)
    report = relation_report(judged)
    assert report["count"] == 14 and report["top5"]["value"] == report["ceiling"]["top5"]
    assert report["floor"]["top5"] < 0.3 and len(report["relations"]) == 7
    blank = [(number, np.full((height, width, 3), 255, np.uint8)) for number in range(14)]
    assert relation_report(judge_all(cases, iter(blank), judge))["top1"]["value"] == 0


def test_the_table_and_the_sheet(judge):
    concepts = judge.concepts
    cases = [*single_cases(3, 0, aspect=1.0), *relation_cases(2, 0, aspect=1.0)]
    pictures = [(number, render_svg(case.scene.svg, 200, 120)) for number, case in enumerate(cases)]
    judged = judge_all(cases, reversed(pictures), judge)
    rows = judged_table(judged, concepts)
    assert [row["prompt"] for row in rows] == [case.prompt for case in cases]
    assert rows[3]["kind"] == "in" and rows[3]["other"] is None and rows[0]["right"] == (rows[0]["rank"] == 0)
    sheet = prompt_sheet(judged, concepts)
    assert sheet.width > 5 * 160 and sheet.height > 160


def test_shares_have_wilsons_interval():
    share = Share.of([True] * 8 + [False] * 2)
    assert (share.value, share.count) == (0.8, 10)
    assert (share.low, share.high) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert Share.of([True] * 5).high == 1 and Share.of([False]).low == 0


@pytest.mark.parametrize(("caged", "same"), [(True, True), (False, True), (True, False)])
def test_in_a_cage_takes_the_thing_and_the_cage(tiny_extractor, caged, same):
    concepts = load_concepts()
    (case,) = relation_cases(1, 0, aspect=1.0)
    shown = case.subject if same else (case.subject + 1) % len(concepts)
    weights = np.zeros((len(concepts) + 1, 193), np.float32)  # biases alone: every picture shows the same
    weights[shown, -1], weights[-1, -1] = 5, 5 if caged else -5
    judgement = Judge(tiny_extractor, ConceptClassifier(concepts, weights, "")).judge(
        case, np.zeros((8, 8, 3), np.uint8)
    )
    assert case.kind == "in" and (judgement.rank == 0) == judgement.both[0] == (caged and same)
    assert judgement.guess == concepts[shown].name + (" in a cage" if caged else "")
