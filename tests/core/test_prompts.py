"""Prompt files: the good lines run, the bad ones are told with their numbers."""

import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from physformer_core.errors import PromptError, SizeError
from physformer_core.prompts import PromptRequest, parse_prompts, read_plain_prompts, read_prompt_file


def parse_line(line: str | dict) -> str | PromptRequest:
    text = line if isinstance(line, str) else json.dumps(line)
    parsed = parse_prompts(text.encode(), source="f", as_json=True)
    return parsed.errors[0].message if parsed.errors else parsed.requests[0]


def test_text_file(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeff# birds\r\na bird\r\n\n   \n  ein Vögel 🐦 \u2028 da\n#no\nlast".encode())
    parsed = read_prompt_file(path)
    assert [(one.line, one.prompt) for one in parsed.requests] == [
        (2, "a bird"),
        (5, "ein Vögel 🐦 \u2028 da"),
        (7, "last"),
    ]
    assert parsed.errors == ()


def test_json_file_with_every_key(tmp_path):
    values = {
        "prompt": "a bird",
        "seed": 2**64 - 1,
        "res": "720p",
        "aspect": "1:1",
        "steps": 8,
        "guidance": 3,
        "detail": 1.05,
        "negative_prompt": "",
        "output": "x.png",
        "width": None,
    }
    path = tmp_path / "p.JSONL"
    path.write_text(json.dumps(values) + "\n\n")
    (request,) = read_prompt_file(path).requests
    assert request == PromptRequest(line=1, **values)
    assert request.size() == (720, 720)
    path.write_text('{"prompt": "a bird", "steps": [8, 2]}')
    assert read_prompt_file(path).requests == (PromptRequest("a bird", 1, steps=(8, 2)),)


def test_prompts_alone(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a bird", "steps": null}\n{"prompt": "a cat"}\n')
    assert read_plain_prompts(path) == ["a bird", "a cat"]
    for line, words in (('{"prompt": "a dog", "steps": 3}', "steps has no effect here"), ("{", "not valid JSON")):
        path.write_text('{"prompt": "a bird"}\n' + line)
        with pytest.raises(PromptError, match=f"line 2: .*{words}"):
            read_plain_prompts(path)


def test_bad_lines_are_told_and_good_ones_kept(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_bytes(
        b'{"prompt": "one"}\n{"prompt": \n{"prompt": "\xff"}\n[1]\n{"prompt": "two", "sede": 1}\n{"prompt": "3"}'
    )
    parsed = read_prompt_file(path)
    assert [one.prompt for one in parsed.requests] == ["one", "3"]
    assert [one.line for one in parsed.errors] == [2, 3, 4, 5]
    assert "column" in str(parsed.errors[0]) and str(parsed.errors[0]).startswith("line 2: not valid JSON")
    assert "UTF-8" in parsed.errors[1].message
    assert "did you mean 'seed'" in parsed.errors[3].message


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ({"seed": 1}, "no prompt"),
        ({"prompt": None}, "no prompt"),
        ({"prompt": "  "}, "not blank"),
        ({"prompt": 3}, "prompt must be text"),
        ({"prompt": "a\0b"}, "prompt must be text"),
        ('{"prompt": "\\ud800 dog"}', "prompt must be text"),
        ({"prompt": "a", "seed": -1}, "seed must be"),
        ({"prompt": "a", "seed": 2**64}, "seed must be"),
        ({"prompt": "a", "seed": True}, "seed must be"),
        ({"prompt": "a", "seed": 1.5}, "seed must be"),
        ({"prompt": "a", "steps": 0}, "steps must be"),
        ({"prompt": "a", "steps": -4}, "steps must be"),
        ({"prompt": "a", "steps": []}, "steps must be"),
        ({"prompt": "a", "steps": [4, True]}, "steps must be"),
        ({"prompt": "a", "detail": 2.5}, "detail must be"),
        ({"prompt": "a", "guidance": "high"}, "guidance must be"),
        ({"prompt": "a", "guidance": -1}, "guidance must be"),
        ({"prompt": "a", "guidance": 10**400}, "guidance must be"),
        ('{"prompt": "a", "guidance": NaN}', "guidance must be"),
        ({"prompt": "a", "width": 0, "height": 10}, "width of 0"),
        ({"prompt": "a", "res": "721p"}, "did you mean 720p"),
        ({"prompt": "a", "res": "720p", "width": 3}, "twice"),
        ({"prompt": "a", "output": ""}, "output must be"),
        ("[" * 100_000, "nested too deeply"),
        ('{"prompt": "a", "seed": ' + "9" * 5000 + "}", "not valid JSON"),
    ],
)
def test_bad_values(line, words):
    message = parse_line(line)
    assert isinstance(message, str) and words in message


def test_standard_input(monkeypatch):
    for data, prompts in ((b"a\n# no\nb", ["a", "b"]), (b'\n  {"prompt": "a"}\n{"prompt": "b"}\n', ["a", "b"])):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))
        parsed = read_prompt_file("-")
        assert [one.prompt for one in parsed.requests] == prompts
        assert parsed.source == "standard input" and parsed.text == data.decode()


def test_nothing_to_read(tmp_path):
    with pytest.raises(PromptError, match="cannot read") as caught:
        read_prompt_file(tmp_path / "none.txt")
    assert caught.value.hint
    (tmp_path / "empty.txt").write_text("\n# only a comment\n")
    with pytest.raises(PromptError, match="no prompts"):
        read_prompt_file(tmp_path / "empty.txt")
    with pytest.raises(PromptError, match="cannot read"):
        read_prompt_file(tmp_path)


def test_a_picture_given_as_a_prompt_file_is_refused_line_by_line():
    parsed = parse_prompts(b"\x89PNG\r\n\x1a\n\0\0", source="f", as_json=False)
    assert parsed.errors and all("\0" not in one.prompt for one in parsed.requests)


def test_sizes_of_a_line_over_those_of_the_command_line():
    plain = PromptRequest("a", 1)
    assert plain.size(res="720p") == (1280, 720)
    assert plain.size(default=(10, 20)) == (10, 20)
    assert PromptRequest("a", 1, res="360p").size(width=64, height=64) == (640, 360)
    assert PromptRequest("a", 1, width=100, height=50).size(res="720p", aspect="1:1") == (100, 50)
    assert PromptRequest("a", 1, aspect="1:1").size(res="720p") == (720, 720)
    assert PromptRequest("a", 1, aspect="2:1").size(width=100, height=50) == (100, 50)
    assert PromptRequest("a", 1, aspect="1:2").size(width=100, height=50) == (50, 100)
    with pytest.raises(SizeError):
        plain.size(res="720p", width=3)


@given(st.binary(max_size=200), st.booleans())
def test_any_bytes_give_lines_or_a_prompt_error(data, as_json):
    try:
        parsed = parse_prompts(data, source="f", as_json=as_json)
    except PromptError:
        return
    assert all(one.prompt.strip() for one in parsed.requests)
