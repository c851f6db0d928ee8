import re

import pytest

from physformer_core.data.scenes import compose_scene, concept_named, load_concepts
from physformer_core.data.scenes.casting import pair_rank
from physformer_core.data.scenes.composer import RELATIONS
from physformer_core.data.scenes.concepts import with_article
from physformer_core.errors import ConfigError
from physformer_core.evaluation.prompt_cases import (
    PHRASINGS,
    chosen_concepts,
    phrased_cases,
    relation_cases,
    single_cases,
)


def test_cases_are_repeatable_and_cover_every_concept_once():
    cases = single_cases(60, 0, aspect=1.0)
    assert len({case.subject for case in cases}) == 60
    assert [case.prompt for case in cases[:20]] == [case.prompt for case in single_cases(20, 0, aspect=1.0)]
    assert [case.prompt for case in cases[:20]] != [case.prompt for case in single_cases(20, 1, aspect=1.0)]
    assert [case.kind for case in cases[:4]] == ["plain", "place"] * 2
    for case in cases[:20]:
        assert load_concepts()[case.subject].name == case.scene.subjects[0].concept
    pairs = relation_cases(14, 0, aspect=16 / 9)
    assert [case.kind for case in pairs[:7]] == list(RELATIONS)
    assert all((case.other is None) == (case.kind == "in") for case in pairs)


def test_subjects_can_be_chosen():
    everyday = chosen_concepts("everyday")
    assert 30 < len(everyday) < 50 and load_concepts()[everyday[0]].weight > 1
    cases = single_cases(2 * len(everyday), 0, aspect=1.0, concepts=everyday)
    assert sorted(case.subject for case in cases) == sorted(2 * everyday)
    cat, dog = chosen_concepts("dog, Cat,dog")
    assert [load_concepts()[row].name for row in (cat, dog)] == ["cat", "dog"]
    assert chosen_concepts("all") == list(range(len(load_concepts())))
    with pytest.raises(ConfigError, match="'elefant'") as refused:
        chosen_concepts("cat,elefant")
    assert "elephant" in refused.value.hint
    with pytest.raises(ConfigError, match="no concept is named"):
        chosen_concepts(" , ")


def test_phrased_prompts_name_their_concept_in_words_that_no_caption_has():
    concepts, cases = load_concepts(), phrased_cases(340, 0, aspect=1.0)
    assert len({case.subject for case in cases[: len(concepts)]}) == len(concepts)
    assert [case.prompt for case in cases[:30]] == [case.prompt for case in phrased_cases(30, 0, aspect=1.0)]
    for case in cases:
        concept, subject = concepts[case.subject], case.scene.subjects[0]
        assert concept.name == subject.concept and case.kind == "phrased" and case.other is None
        names = [re.sub("^(a|an|the|some) ", "", name) for name in (concept.phrase, *concept.synonyms)]
        assert any(name in case.prompt for name in names), case.prompt
        assert subject.colour is None or subject.colour in case.prompt
        assert not re.search(r"[{}]|\ba (an?|some|the)\b", case.prompt), case.prompt
    assert phrased_cases(0, 0, aspect=1.0) == []
    with_synonyms = [case for case in cases if concepts[case.subject].synonyms]
    assert len(with_synonyms) > 50
    for case in with_synonyms:
        nouns = [re.sub("^(a|an|the|some) ", "", name) for name in concepts[case.subject].synonyms]
        assert any(noun in case.prompt for noun in nouns), case.prompt


def test_no_scene_is_described_in_a_phrasing():
    for number in range(400):
        scene = compose_scene(5, number)
        if not scene.subjects:
            continue
        concept = concept_named(scene.subjects[0].concept)
        for name in (concept.phrase, *concept.synonyms):
            article, noun = with_article(name)
            asked = {phrasing.replace("{a}", f"{article} {noun}").replace("{}", noun) for phrasing in PHRASINGS}
            assert not asked & set(scene.captions), scene.captions


def test_relations_of_held_out_pairs_and_of_the_others():
    concepts = load_concepts()
    for low, high in ((0.0, 0.1), (0.1, 1.0)):
        cases = relation_cases(12, 0, aspect=1.0, pair_ranks=(low, high))
        assert [case.kind for case in cases[:6]] == [relation for relation in RELATIONS if relation != "in"]
        for case in cases:
            assert case.other is not None
            assert low <= pair_rank(concepts[case.subject], concepts[case.other]) < high
