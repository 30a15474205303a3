"""Captions: which text each chunk of a path has."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ..files import FileError, parse_json, read_json, reading

CHUNK_FRAMES = 80  # new frames per chunk of the Lyra 2 weights
LONGEST_NUMBER = 9  # digits of a frame


def load_captions(file: str | Path) -> dict[int, str]:
    """First frame -> text, in order, from a JSON file like {"0": "a street", "81": "a square"}."""
    return captions_of(read_json(file), str(file))


def parse_captions(text: str) -> dict[int, str]:
    """The same of JSON text."""
    return captions_of(parse_json(text, "the given JSON"), "the given JSON")


def captions_in(prompt: str) -> dict[int, str] | None:
    """The captions that a prompt holds, or None if it is a prompt.

    Captions are a JSON object with frame numbers as keys. Everything else is a text for all chunks, braces or not: people
    write {day|night} for alternatives. ValueError for an object of which only some keys are frame numbers.
    """
    try:
        record = parse_json(prompt, "the captions")
    except FileError:
        return None
    if not isinstance(record, dict) or (record and not any(map(_is_frame, record))):
        return None
    return captions_of(record, "the captions") if record else {}


def _is_frame(key: str) -> bool:
    return key.strip().isdecimal() and len(key.strip()) <= LONGEST_NUMBER


def captions_of(record: object, name: str) -> dict[int, str]:
    """The captions that a JSON value of this name says; FileError that names what is none."""
    with reading(name):
        return _captions(record, name)


def _captions(record: object, name: str) -> dict[int, str]:
    if not isinstance(record, dict):
        raise ValueError(f"{name}: expected a JSON object, found a {type(record).__name__}")
    captions: dict[int, str] = {}
    for key, text in record.items():
        if not _is_frame(key):
            raise ValueError(
                f"{name}: caption key {key!r} is not a frame number; keys say from which "
                'frame on a text counts, as in "0" or "81"'
            )
        if text is None:
            continue
        if not isinstance(text, str):
            raise ValueError(f"{name}: the caption of frame {key} is not a text; found {text!r}")
        if int(key) in captions:
            raise ValueError(f"{name}: frame {int(key)} has two captions; keep one")
        captions[int(key)] = text
    if not captions:
        raise ValueError(f"{name}: there is no caption in it; add at least one for frame 0")
    return dict(sorted(captions.items()))


def caption_for_chunk(
    captions: Mapping[int, str], chunk_index: int, frames: int, chunk_frames: int = CHUNK_FRAMES
) -> str:
    """The text of a chunk of a video of `frames` frames: the latest that begins by the chunk's first new frame.

    Captions numbered 0, 1, 2 or 1, 2, 3 are numbered by chunk: as frames all but the last would never be shown.
    """
    numbers = sorted(captions)
    if len(numbers) > 1 and numbers == list(range(numbers[0], numbers[0] + len(numbers))) and numbers[0] <= 1:
        return captions[numbers[min(chunk_index, len(numbers) - 1)]]
    kept = [key for key in captions if key < frames]
    if not kept:
        raise ValueError(
            f"no caption begins within the video's {frames} frames (they begin at {sorted(captions)})"
            "; add one for frame 0"
        )
    first_new = min(chunk_frames * chunk_index + 1, frames - 1)
    return captions[max((key for key in kept if key <= first_new), default=min(kept))]


def caption(prompt: str, chunk_index: int, frames: int, chunk_frames: int = CHUNK_FRAMES) -> str:
    """A chunk's text: its caption if the prompt is captions JSON, else the prompt."""
    captions = captions_in(prompt)
    if captions is None:
        return prompt
    return caption_for_chunk(captions, chunk_index, frames, chunk_frames) if captions else ""
