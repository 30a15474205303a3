import json
from pathlib import Path

import pytest

from lyra_core.cameras.captions import caption, caption_for_chunk, captions_in, load_captions, parse_captions

CASES = Path(__file__).parent / "cases"


def test_a_caption_counts_from_the_chunk_whose_first_new_frame_it_names():
    captions = {0: "a", 81: "b", 162: "c", 400: "d"}
    assert [caption_for_chunk(captions, c, 321) for c in range(4)] == ["a", "b", "b", "c"]
    assert caption_for_chunk({90: "late", 10: "early"}, 0, 161) == "early"
    assert caption_for_chunk({5: "x", 400: "beyond the end"}, 4, 321) == "x"
    assert caption_for_chunk({0: "a", 3: "b"}, 1, 5, chunk_frames=2) == "b"
    with pytest.raises(ValueError, match=r"within the video's 81 frames \(they begin at \[81\]\)"):
        caption_for_chunk({81: "x"}, 0, 81)


@pytest.mark.parametrize("first", [0, 1])
def test_captions_numbered_in_a_row_are_those_of_the_chunks(first):
    captions = {first: "a", first + 1: "b", first + 2: "c"}
    assert [caption_for_chunk(captions, c, 401) for c in range(5)] == ["a", "b", "c", "c", "c"]
    assert caption_for_chunk({1: "a", 81: "b", 161: "c"}, 2, 241) == "c"
    assert caption_for_chunk({0: "a"}, 3, 321) == "a"


def test_captions_are_read_in_the_order_of_their_frames(tmp_path):
    text = '{"81": "b", "0": "a", "161": "ü", "200": null}'
    (tmp_path / "c.json").write_text(text, encoding="utf-8")
    (tmp_path / "bom.json").write_text("\ufeff" + text, encoding="utf-8")
    assert list(parse_captions(text).items()) == [(0, "a"), (81, "b"), (161, "ü")]
    for file in (tmp_path / "c.json", str(tmp_path / "c.json"), tmp_path / "bom.json"):
        assert load_captions(file) == captions_in(text) == parse_captions(text)


@pytest.mark.parametrize("text, says", [
    ('{"0": "a", "end": "b"}', "key 'end'"), ('{"-1": "a"}', "key '-1'"), ('{"1.5": "a"}', "key '1.5'"),
    ('{"0": 3}', "not a text; found 3"), ('{"1": "a", "01": "b"}', "two captions"), ("{}", "no caption"),
    ("{", "JSON"), ("[1]", "expected a JSON object")])
def test_captions_that_make_no_sense_are_refused(text, says, tmp_path):
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(ValueError, match=says):
        parse_captions(text)
    with pytest.raises(ValueError, match=rf"c\.json.*{says}"):
        load_captions(tmp_path / "c.json")


PROMPTS = [
    "{day|night} street, wet cobblestones, warm windows, the camera moves slowly forward\n",
    "a room",
    "{",
    "{}}",
    "{a hall}",
    '{"style": "oil painting", "subject": "a hall"}',
    '["a hall", "a door"]',
    '"a hall"',
    "{{day|night}|dusk} over {hills|a sea}",
    "/etc/passwd",
    "81",
    '{"-1": "a"}',
]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_prompt_is_taken_as_it_is_whatever_its_braces(prompt):
    assert captions_in(prompt) is None
    assert [caption(prompt, chunk, 241) for chunk in range(3)] == [prompt] * 3


def test_the_prompt_of_the_case_is_taken_as_it_is():
    prompt = (CASES / "prompt-in-braces" / "prompt.txt").read_text()
    assert prompt.startswith("{day|night}") and caption(prompt, 0, 81) == prompt


def test_a_prompt_that_is_captions_gives_each_chunk_its_own():
    prompt = " \n" + json.dumps({"0": "a hall", "81": "a door"})
    assert [caption(prompt, chunk, 241) for chunk in range(3)] == ["a hall", "a door", "a door"]
    assert caption("{}", 1, 241) == ""  # what Load Trajectory gives without captions
    with pytest.raises(ValueError, match="'8l' is not a frame number"):  # a slip of the pen is no prompt
        caption('{"0": "a hall", "8l": "a door"}', 0, 81)
