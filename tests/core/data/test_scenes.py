"""Scenes: determinism, honest captions, sharp windows, resumable sets."""

from __future__ import annotations

import json
import os
import re

import numpy as np
import pytest

from physformer_core.data.scenes import (
    FAMILIAR_PROMPTS,
    compose_scene,
    fetch_scenes,
    load_concepts,
    render_svg,
    wordings,
)
from physformer_core.data.scenes.backdrops import PLACE_TIMES, draw_place
from physformer_core.data.scenes.captions import described
from physformer_core.data.scenes.casting import SUPPORTS, pair_rank, places_of, times_of
from physformer_core.data.scenes.composer import ALONE, KINDS, RELATIONS
from physformer_core.data.scenes.concepts import art_markup, art_shape, concept_named
from physformer_core.errors import DataError, OutputError

SAMPLE = [compose_scene(11, index) for index in range(400)]


def test_a_scene_depends_on_seed_and_index_alone():
    first = compose_scene(11, 37)
    assert first == SAMPLE[37]
    assert compose_scene(12, 37) != first


def test_concepts_have_art_places_and_distinct_names():
    concepts = load_concepts()
    assert 300 <= len(concepts) <= 360
    for concept in concepts:
        assert art_markup(concept.art)
        assert all(times_of(concept, place) for place in places_of(concept)), concept.name
    phrases = [phrase for concept in concepts for phrase in (concept.phrase, *concept.synonyms)]
    assert len(set(phrases)) == len(phrases)
    for name in ("bird", "cat", "car", "dragon", "mountain", "dog", "horse", "fish", "tree", "house", "boat", "rocket"):
        assert concept_named(name)
    for name in SUPPORTS:
        assert concept_named(name)


def test_painted_fills_occur_in_the_art():
    for concept in load_concepts():
        for fill in concept.paint[1:]:
            assert fill.lower() in art_markup(concept.art).lower(), concept.name


def test_art_is_measured():
    shape = art_shape(concept_named("car").art)
    assert shape.left < 2 and shape.right > 34 and shape.height < shape.width
    assert shape.colour[0] > shape.colour[2]


def test_captions_name_what_is_shown():
    for scene in SAMPLE:
        assert len(scene.captions) == 2
        for caption in scene.captions:
            assert 1 <= len(caption.split()) <= 20
            caption = caption.lower()
            for placed in scene.subjects:
                if placed.concept == "cage":
                    assert "cage" in caption
                    continue
                concept = concept_named(placed.concept)
                nouns = [phrase.split(" ", 1)[1] for phrase in (concept.phrase, *concept.synonyms)]
                assert any(noun in caption for noun in nouns), (caption, placed)
                if placed.colour:
                    assert placed.colour in caption


def test_captions_are_worded_in_many_ways():
    everyday = [scene.captions[1].lower() for scene in SAMPLE]
    assert len(set(everyday)) > 0.97 * len(everyday)
    assert 0.15 < sum("," in caption for caption in everyday) / len(everyday) < 0.5
    for caption in everyday:
        assert not re.search(r"\ba (?:[aeio]|un(?!i))|\ban (?!suv)[^aeiou]|[{}]|  | ,", caption), caption
    named, by_synonym = 0, 0
    for scene in SAMPLE:
        for placed in scene.subjects[:1]:
            concept = concept_named(placed.concept)
            # A synonym that is a part of the name, such as "cake", can't be told from it.
            nouns = [noun for synonym in concept.synonyms if (noun := synonym.split(" ", 1)[1]) not in concept.name]
            named += 2 * bool(nouns)
            by_synonym += sum(any(noun in caption.lower() for noun in nouns) for caption in scene.captions)
    assert by_synonym > named / 3


def test_every_wording_names_what_it_is_about():
    assert len(set(wordings.FRAMES)) == len(wordings.FRAMES) >= 60
    assert all(frame.count("{x}") == 1 for frame in wordings.FRAMES)
    for table in (wordings.RELATIONS, wordings.LIVELY_RELATIONS, wordings.LISTED):
        assert set(table) <= set(RELATIONS)
        assert all(text.count("{a}") == text.count("{b}") == 1 for texts in table.values() for text in texts)
    assert all(text.count("{c}") == 1 for text in wordings.BACKGROUNDS + wordings.LISTED_BACKGROUNDS)
    assert set(wordings.PLACES) == set(wordings.PLACES_ALONE) == set(PLACE_TIMES)


@pytest.mark.parametrize(
    ("phrase", "word", "expected"),
    [
        ("an owl", "happy", "a happy owl"),
        ("a cat", "old", "an old cat"),
        ("some grapes", "nice", "some nice grapes"),
        ("the sun", "big", "the big sun"),
    ],
)
def test_articles_suit_the_word_that_follows(phrase: str, word: str, expected: str):
    assert described(phrase, word) == expected


def test_familiar_prompts_are_drawn_with_their_words():
    captions = {scene.captions[0]: scene for scene in (compose_scene(3, index, kind="prompt") for index in range(80))}
    assert set(captions) == set(FAMILIAR_PROMPTS)
    assert captions["a bird in a cage"].relation == "in"
    assert captions["a beautiful sunset over the ocean"].time == "sunset"
    assert captions["a red car on a city street"].place == "street"


def test_all_kinds_occur_and_subjects_are_large():
    single = [scene for scene in SAMPLE if scene.place is None and len(scene.subjects) == 1]
    assert 0.2 < len(single) / len(SAMPLE) < 0.6
    for scene in single:
        top, left, bottom, right = scene.subjects[0].box
        longer = max((bottom - top) * scene.height, (right - left) * scene.width) / min(scene.width, scene.height)
        assert 0.5 <= longer <= 0.9


@pytest.mark.parametrize("relation", list(RELATIONS))
@pytest.mark.parametrize("aspect", [1.0, 21 / 9, 9 / 21])
def test_boxes_fit_the_relation(relation: str, aspect: float):
    for index in range(12):
        scene = compose_scene(5, index, relation=relation, aspect=aspect)
        subject, other = scene.subjects
        assert (subject.role, other.role, scene.relation) == ("subject", "object", relation)
        (top, left, bottom, right), (o_top, o_left, o_bottom, o_right) = subject.box, other.box
        assert 0 <= top < bottom <= 1 and 0 <= left < right <= 1
        middle, o_middle = (left + right) / 2, (o_left + o_right) / 2
        if relation == "in":
            assert o_top < top and bottom < o_bottom and o_left < left and right < o_right
        elif relation == "over":
            assert bottom <= o_top + 0.02
        elif relation == "under":
            assert bottom > o_bottom - 0.02 and top > o_top
        elif relation == "on":
            assert bottom < o_bottom and top < o_top and o_left < middle < o_right
        elif relation == "next to":
            assert right <= o_left + 0.01 or o_right <= left + 0.01
        elif relation == "in front of":
            assert bottom > o_bottom - 0.01 and abs(middle - o_middle) < 0.5
        else:
            assert bottom < o_bottom + 0.01 and top < o_top


@pytest.mark.parametrize("aspect", [1.0, 16 / 9, 9 / 16])
def test_a_thing_alone_has_one_size_and_few_places(aspect: float):
    for name in ("cat", "car", "bird", "rocket"):
        boxes = [
            compose_scene(2, index, kind=kind, aspect=aspect, concept=name).subjects[0].box
            for kind in ("single", "setting")
            for index in range(40)
        ]
        for top, left, bottom, right in boxes:
            assert max((bottom - top) * max(1, 1 / aspect), (right - left) * max(1, aspect)) == pytest.approx(
                ALONE, 1e-3
            )
        assert len({round(box[0], 2) for box in boxes}) <= (4 if aspect >= 1 else 8)  # heights
        assert len({round(box[1], 2) for box in boxes}) == (3 if aspect > 1 else 1)


def test_what_stands_stands_on_the_ground_in_tall_pictures_too(monkeypatch):
    drawn = []
    monkeypatch.setattr(
        "physformer_core.data.scenes.composer.draw_place",
        lambda *given, **options: drawn.append(draw_place(*given, **options)) or drawn[-1],
    )
    checked = 0
    for index in range(160):
        drawn.clear()
        scene = compose_scene(3, index, kind="pair", aspect=9 / 21)
        if drawn and drawn[0].ground is not None:
            checked += 1
            assert max(placed.box[2] for placed in scene.subjects) >= drawn[0].ground[0], scene.captions
    assert checked > 40


def test_every_place_renders_at_every_time_and_aspect():
    for place, times in PLACE_TIMES.items():
        for time in times:
            for aspect, size in ((1.0, (64, 64)), (21 / 9, (112, 48)), (9 / 21, (48, 112))):
                scene = compose_scene(1, 0, kind="place", place=place, time=time, aspect=aspect)
                pixels = render_svg(scene.svg, *size)
                assert pixels.shape == (size[1], size[0], 3) and pixels.std() > 3


def test_a_window_is_the_same_part_of_the_whole_picture():
    for index in range(6):
        scene = compose_scene(7, index, aspect=16 / 9)
        whole = render_svg(scene.svg, 640, 360)
        window = render_svg(scene.svg, 96, 64, full_width=640, full_height=360, top=120, left=200)
        difference = np.abs(window.astype(int) - whole[120:184, 200:296])
        # Only the coverage of edge pixels may differ, by a few of its 16 steps: a clipped path is cut up differently.
        assert difference.mean() < 0.6 and difference.max() <= 64 and (difference > 4).mean() < 0.03


def test_render_errors_are_the_users():
    svg = compose_scene(7, 0).svg
    with pytest.raises(DataError, match="does not lie"):
        render_svg(svg, 64, 64, full_width=64, full_height=64, top=1)
    with pytest.raises(DataError, match="viewBox"):
        render_svg("<svg></svg>", 8, 8)
    with pytest.raises(DataError, match="can't be rendered"):
        render_svg('<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1 1"><g></svg>', 8, 8)
    with pytest.raises(DataError, match="no concept"):
        compose_scene(0, 0, kind="single", concept="qwerty")
    assert set(KINDS) == {"single", "setting", "pair", "place", "prompt"}


def test_fetch_resumes_and_does_not_depend_on_workers(tmp_path):
    import pyarrow.parquet as pq

    one = fetch_scenes(tmp_path / "one", count=25, seed=4, rows_per_file=10)
    two = fetch_scenes(tmp_path / "two", count=25, seed=4, rows_per_file=10, workers=2)
    assert one == two == json.loads((tmp_path / "one" / "manifest.json").read_text())
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == [
        "examples-00000.parquet", "examples-00001.parquet", "examples-00002.parquet", "manifest.json",
    ]  # fmt: skip
    rows = pq.read_table(tmp_path / "one" / "examples-00002.parquet").to_pylist()
    scene = compose_scene(4, 20)
    assert rows[0]["key"] == scene.key and rows[0]["svg"] == scene.svg and rows[0]["captions"] == list(scene.captions)
    assert json.loads(rows[0]["meta"])["relation"] == scene.relation

    class Stop(RuntimeError):
        pass

    def stop_after_one(done: int, _count: int) -> None:
        if done > 10:
            raise Stop

    with pytest.raises(Stop):
        fetch_scenes(tmp_path / "three", count=25, seed=4, rows_per_file=10, progress=stop_after_one)
    assert not (tmp_path / "three" / "manifest.json").exists()
    stamp = (tmp_path / "three" / "examples-00000.parquet").stat().st_mtime_ns
    assert fetch_scenes(tmp_path / "three", count=25, seed=4, rows_per_file=10) == one
    assert (tmp_path / "three" / "examples-00000.parquet").stat().st_mtime_ns == stamp
    with pytest.raises(DataError, match="another set"):
        fetch_scenes(tmp_path / "three", count=26, seed=4, rows_per_file=10)


def test_a_worker_that_is_killed_is_told_and_the_rest_kept(tmp_path):
    import multiprocessing
    import signal

    def kill(_done, _count):
        for child in multiprocessing.active_children():
            os.kill(child.pid, signal.SIGKILL)

    with pytest.raises(DataError, match="a worker process died"):
        fetch_scenes(tmp_path / "set", count=4000, seed=4, rows_per_file=1000, workers=2, progress=kill)
    assert not (tmp_path / "set" / "manifest.json").exists()


def test_a_folder_of_another_set_is_refused_even_if_it_was_only_begun(tmp_path):
    folder = tmp_path / "set"
    (folder / ".partial").mkdir(parents=True)
    (folder / ".partial" / "source.json").write_text('{"source": {"name": "folder", "fingerprint": "x"}}')
    (folder / "examples-00000.parquet").write_bytes(b"theirs")
    with pytest.raises(DataError, match="already holds another set"):
        fetch_scenes(folder, count=2, seed=4)
    (folder / ".partial" / "source.json").unlink()
    with pytest.raises(DataError, match="already holds another set"):
        fetch_scenes(folder, count=2, seed=4)
    assert (folder / "examples-00000.parquet").read_bytes() == b"theirs"


def test_two_at_once_do_not_mix(tmp_path):
    def again(done, _count):
        if done == 5:
            with pytest.raises(OutputError, match="being written by another process"):
                fetch_scenes(tmp_path / "set", count=10, seed=4)

    fetch_scenes(tmp_path / "set", count=10, seed=4, progress=again)


def test_files_of_others_below_a_set_are_left_alone(tmp_path):
    """Of a checkpoint that is just written, say."""
    theirs = tmp_path / "set" / "runs" / ".model.abcdef.tmp.safetensors"
    theirs.parent.mkdir(parents=True)
    theirs.write_bytes(b"half")
    ours = tmp_path / "set" / ".examples-00000.abcdef.tmp.parquet"
    ours.write_bytes(b"half")
    fetch_scenes(tmp_path / "set", count=2, seed=4)
    assert theirs.exists() and not ours.exists()


def test_the_share_of_pairs_can_be_chosen(tmp_path):
    import pyarrow.parquet as pq

    shares = {}
    for share in (None, 0.0, 0.8, 1.0):
        scenes = [compose_scene(4, index, pair_share=share) for index in range(200)]
        shares[share] = sum(scene.relation is not None for scene in scenes) / len(scenes)
        if share == 0.0:
            plain = sum(scene.background is not None and len(scene.subjects) == 1 for scene in scenes) / len(scenes)
            assert 0.25 < plain < 0.5, "the others keep their proportions"
    # A familiar prompt, one scene in eleven of the others, may be of a relation, too.
    assert shares[0.0] < 0.1 and shares[1.0] == 1
    assert 0.35 < shares[None] < 0.6 and 0.7 < shares[0.8] < 0.9
    more = fetch_scenes(tmp_path / "more", count=20, seed=4, pair_share=1.0)
    assert more["source"]["options"]["pair_share"] == 1.0
    metas = pq.read_table(tmp_path / "more" / "examples-00000.parquet")["meta"].to_pylist()
    assert all(json.loads(meta)["relation"] for meta in metas)
    with pytest.raises(DataError, match=r"share of pairs of 1\.5 is not from 0 to 1"):
        fetch_scenes(tmp_path / "wrong", count=20, seed=4, pair_share=1.5)
    assert not (tmp_path / "wrong").exists()


def test_pairs_can_be_held_out(tmp_path):
    import pyarrow.parquet as pq

    def pair(scene):
        return tuple(concept_named(subject.concept) for subject in scene.subjects)

    def pairs(ranks):
        scenes = [compose_scene(9, k, relation=how, pair_ranks=ranks) for how in ("next to", "on") for k in range(40)]
        return [pair_rank(*pair(scene)) for scene in scenes]

    assert all(rank >= 0.1 for rank in pairs((0.1, 1.0))) and all(rank < 0.1 for rank in pairs((0.0, 0.1)))
    everything = pairs((0.0, 1.0))
    assert 0 < sum(rank < 0.5 for rank in everything) < len(everything)
    cat, dog = concept_named("cat"), concept_named("dog")
    assert pair_rank(cat, dog) == pair_rank(dog, cat) != pair_rank(cat, cat)
    # Only pairs that are held out change: all others of a collection stay the very same scenes.
    for k in range(60):
        scene = compose_scene(3, k)
        shown = pair(scene) if len(scene.subjects) == 2 and scene.relation != "in" else None
        same = compose_scene(3, k, pair_ranks=(0.1, 1.0)).svg == scene.svg
        assert same == (shown is None or pair_rank(*shown) >= 0.1)

    plain = fetch_scenes(tmp_path / "plain", count=60, seed=4)
    fewer = fetch_scenes(tmp_path / "fewer", count=60, seed=4, held_out_pairs=0.6)
    for folder, least in (("plain", 0.0), ("fewer", 0.6)):
        rows = pq.read_table(tmp_path / folder / "examples-00000.parquet").to_pylist()
        metas = [json.loads(row["meta"]) for row in rows]
        shown = [
            pair_rank(*(concept_named(one["concept"]) for one in meta["subjects"]))
            for meta in metas
            if len(meta["subjects"]) == 2 and meta["relation"] != "in"
        ]
        assert shown and (min(shown) < 0.6) == (least == 0) and min(shown) >= least
    assert "held_out_pairs" not in plain["source"]["options"]
    assert fewer["source"]["options"]["held_out_pairs"] == 0.6
    with pytest.raises(DataError, match="another set"):
        fetch_scenes(tmp_path / "plain", count=60, seed=4, held_out_pairs=0.1)
    for wrong in (-0.1, 0.01, 0.95):
        with pytest.raises(DataError, match="share of pairs held out"):
            fetch_scenes(tmp_path / "wrong", count=5, seed=4, held_out_pairs=wrong)
    assert not (tmp_path / "wrong").exists()
    with pytest.raises(DataError, match="too few"):
        compose_scene(0, 0, pair_ranks=(0.5, 0.51))
