"""Marks of several networks on held-out scenes: what is made of a scene, what is not made twice, and the processes that make it."""

from __future__ import annotations

import json
import time

import pytest
import torch
from learners import ENCODERS, SMALL, Painter
from test_tiny_scoring import knowing

SIZE = (32, 48)


@pytest.fixture(scope="module")
def marks(train):
    return train.marks


@pytest.fixture
def told(marks, monkeypatch):
    """Networks that are only named, and marks that say of whom and of what they are."""
    monkeypatch.setattr(marks, "_read", lambda file, device, awaited: (file.stem, None) if file.exists() else None)
    monkeypatch.setattr(marks, "chunk_marks", lambda model, encoders, film, recipe, number, parts: {"of": [model, number, len(film)]})
    monkeypatch.setattr(
        marks, "walk_marks", lambda model, encoders, film, recipe, number: {"scores": {"length": len(film)}, "curves": {"colour": [number, 1.0]}}
    )


def test_walks_come_first_and_have_their_own_files(marks, tmp_path):
    todo = marks.tasks(2, 1)
    assert [task.file(tmp_path, "no FramePack").name for task in todo] == [
        "no-FramePack.walk-0.json", "no-FramePack.chunk-0.json", "no-FramePack.chunk-1.json",
    ]  # fmt: skip


def test_every_network_is_marked_on_every_scene_once(train, marks, tmp_path, told):
    recipes, todo = {"full": SMALL, "no FramePack": SMALL, "never trained": SMALL}, marks.tasks(2, 2)
    for name in ("full", "no-FramePack"):
        (tmp_path / f"{name}.safetensors").touch()
    todo[1].file(tmp_path, "full").write_text(json.dumps({"scores": {"length": 7}}))  # of an earlier time
    marks.make(tmp_path, recipes, todo, 5, SIZE)
    assert len(list(tmp_path.glob("*.json"))) == 8 and not list(tmp_path.glob("*.part"))
    chunks = 1 + train.films.CHUNKS * SMALL.chunk
    scores, curves = marks.gathered(tmp_path, "no FramePack", todo)
    assert scores == {"length": [41, 41], "of": [["no-FramePack", 0, chunks], ["no-FramePack", 1, chunks]]}
    assert curves == {"colour": [[0, 1.0], [1, 1.0]]}
    assert marks.gathered(tmp_path, "full", todo)[0]["length"] == [41, 7]
    assert marks.gathered(tmp_path, "never trained", todo) == ({}, {})


def test_what_comes_back_is_marked_by_a_network_that_knows_and_by_one_that_does_not(train, marks):
    film = train.films.filmed([train.films.HELD_OUT], SMALL, 5, SIZE, True)[0]
    window = film.windows(SMALL.chunk, SMALL.windows)[-1]
    parts = train.scoring.parts(film, window, SMALL)
    painter = Painter()
    good, bad = (marks.chunk_marks(model, ENCODERS, film, SMALL, 0, parts) for model in (knowing(film, window.segment)[0], painter))
    assert len({float(shown.history.sum()) for _noisy, _times, shown in painter.calls}) == 2  # with the memory and without
    measures = {f"{part}: {measure}" for part in ("remembered", "new") for measure in ("PSNR", "SSIM", "GMSD")}
    assert {*good} == measures | {"remembered, without retrieval: PSNR", "reprojection error", "camera, degrees", "camera, units"}
    assert good["remembered: PSNR"] > bad["remembered: PSNR"] + 5 and good["new: GMSD"] < bad["new: GMSD"]
    assert all(torch.isfinite(torch.tensor(value)) for found in (good, bad) for value in found.values())


def test_a_walk_has_curves_of_all_its_chunks_and_their_slopes(train, marks):
    film = train.films.filmed([train.films.HELD_OUT + 1], SMALL, 3, SIZE, True)[0]
    found = marks.walk_marks(Painter(), ENCODERS, film, SMALL, 1)
    assert {len(curve) for curve in found["curves"].values()} == {3} and {*found["curves"]} == {"colour", "sharpness"}
    for what, curve in found["curves"].items():
        assert found["scores"][f"{what}, slope a chunk"] == pytest.approx(abs(curve[2] - curve[0]) / 2)


def test_processes_wait_for_networks_and_end_with_whoever_asked(marks, tmp_path):
    """Two of them; one's network is said never to come, the other waits for one until it is ended."""
    started = time.monotonic()
    (tmp_path / "gone.none").touch()
    with marks.Markers(tmp_path, {"gone": SMALL}, marks.tasks(1, 0), 2, SIZE, 1) as markers:
        markers.finish(lambda: 120 - (time.monotonic() - started))
        assert [process.poll() for process in markers.processes] == [0]
    with marks.Markers(tmp_path, {"awaited": SMALL}, marks.tasks(1, 0), 2, SIZE, 1) as markers:
        markers.finish(lambda: 0.0)
        assert markers.processes[0].poll() is None
    assert markers.processes[0].poll() is not None and not list(tmp_path.glob("*.json"))


def test_without_processes_the_marks_are_made_here(marks, tmp_path, told):
    (tmp_path / "full.safetensors").touch()
    with marks.Markers(tmp_path, {"full": SMALL}, marks.tasks(1, 0), 2, SIZE, 0) as markers:
        markers.finish(lambda: 0.0)
    assert [file.name for file in tmp_path.glob("*.json")] == ["full.chunk-0.json"]
