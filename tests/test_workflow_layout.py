"""Where the nodes of the shipped workflows stand, how their links run, and what their values say."""

from __future__ import annotations

import hashlib
import itertools
import json
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parent.parent
WORKFLOWS = sorted(file.stem for file in (PROJECT / "workflows").glob("*.json"))
BESIDE = 4  # pixels by which a link may lie within a node's edge
pytestmark = pytest.mark.usefixtures("graphs")


def workflow_of(name: str) -> dict:
    return json.loads((PROJECT / "workflows" / f"{name}.json").read_text(encoding="utf-8"))


def boxes_of(workflow: dict, graphs) -> dict[int, object]:
    title = graphs.layout.TITLE
    return {
        node["id"]: graphs.layout.Box(x, y - title, x + node["size"][0], y + node["size"][1])
        for node in workflow["nodes"]
        for x, y in [node["pos"]]
    }


@pytest.mark.parametrize("name", WORKFLOWS)
def test_nodes_stand_apart_and_whole_in_one_group(graphs, name):
    workflow = workflow_of(name)
    boxes = boxes_of(workflow, graphs)
    assert not [pair for pair in itertools.combinations(boxes.values(), 2) if pair[0].meets(pair[1], 20)]
    groups = [graphs.layout.Box(x, y, x + w, y + h) for x, y, w, h in (group["bounding"] for group in workflow["groups"])]
    notes = {node["id"] for node in workflow["nodes"] if node["type"] == graphs.parts.NOTE}
    for number, box in boxes.items():
        around = [group for group in groups if group.meets(box)]
        assert len(around) == (number not in notes)
        assert all(group.around(box) == group for group in around)


@pytest.mark.parametrize("name", WORKFLOWS)
def test_no_link_runs_under_a_node(graphs, name):
    """Between two turns a link is straight; before the first and after the last it stays in the gap between two columns."""
    workflow = workflow_of(name)
    boxes = boxes_of(workflow, graphs)
    turns = {turn["id"]: turn for turn in workflow["extra"].get("reroutes", [])}
    last = {each["id"]: each["parentId"] for each in workflow["extra"].get("linkExtensions", [])}
    places = {node["id"]: node["pos"] for node in workflow["nodes"]}
    for number, source, output, target, entry, _ in workflow["links"]:
        way, turn = [], last.get(number)
        while turn is not None:
            way.insert(0, turns[turn]["pos"])
            assert number in turns[turn]["linkIds"]
            turn = turns[turn].get("parentId")
        if not way:
            heights = [places[node][1] + graphs.layout.SLOT * (slot + 0.7) for node, slot in ((source, output), (target, entry))]
            way = list(zip((boxes[source].right, boxes[target].left), heights, strict=True))
        for (x, y), (then_x, then_y) in itertools.pairwise(way):
            line = graphs.layout.Box(min(x, then_x), min(y, then_y), max(x, then_x), max(y, then_y))
            under = [node for node, box in boxes.items() if box.meets(line, -BESIDE)]
            assert not under, f"link {number} from {source} to {target} runs under {under}"
        ends = (way[0][0] - boxes[source].right, boxes[target].left - way[-1][0])
        assert all(0 <= end < graphs.layout.BETWEEN_COLUMNS for end in ends), "it turns in the gap beside its nodes"


@pytest.mark.parametrize("name", WORKFLOWS)
def test_a_workflow_begins_with_its_note_and_its_groups_have_their_own_titles_and_colours(graphs, name):
    workflow = workflow_of(name)
    note = workflow["nodes"][0]
    boxes = boxes_of(workflow, graphs)
    assert note["type"] == graphs.parts.NOTE and "static scenes only" in note["widgets_values"][0].lower()
    assert boxes[note["id"]].left == min(box.left for box in boxes.values())
    assert boxes[note["id"]].top == min(box.top for box in boxes.values())
    titles = [group["title"] for group in workflow["groups"]]
    assert [title for title in titles if title != "Models"] == sorted(set(titles) - {"Models"})
    assert all(title[0].isdigit() or title == "Models" for title in titles)
    first_digits = {title[0] for title in titles}
    assert len({group["color"] for group in workflow["groups"]}) == len(first_digits)


@pytest.mark.parametrize("name", WORKFLOWS)
def test_photos_are_cropped_from_a_picture_that_every_host_has_and_no_world_becomes_floats(name):
    nodes = workflow_of(name)["nodes"]
    values = {kind: [node["widgets_values"] for node in nodes if node["type"] == kind] for kind in ("LoadImage", "ImageScale")}
    assert all(each[0] == "example.png" for each in values["LoadImage"])
    assert all("center" in each for each in values["ImageScale"])
    assert "Lyra2WorldFrames" not in {node["type"] for node in nodes}
    if values["ImageScale"]:
        assert "never stretched" in nodes[0]["widgets_values"][0]


def test_every_workflow_has_a_thumbnail_of_its_own(project):
    pictures = [project / "workflows" / f"{name}.jpg" for name in WORKFLOWS]
    assert len({hashlib.sha256(picture.read_bytes()).hexdigest() for picture in pictures}) == len(WORKFLOWS)


# ------------------------------------------------------------------------------------------------------ laws of layout.py


def place(graphs, *bands, sizes=None):
    graph = graphs.describe.Graph(tuple((band,) if isinstance(band, graphs.describe.Group) else band for band in bands))
    size_of = lambda node: (sizes or {}).get(node.kind, (100, 100))  # noqa: E731
    return graphs.layout.place(graph, size_of, lambda node, entry: list(node.sources).index(entry))


def group(graphs, title: str, *columns: dict[str, dict]) -> object:
    node = graphs.describe.Node
    nodes = [{name: node(name, {}, {k: (v, 0) for k, v in sources.items()}) for name, sources in column.items()} for column in columns]
    return graphs.describe.Group(title, "#fff", tuple(nodes))


def test_a_taller_node_moves_what_is_below_it_and_widens_only_its_column(graphs):
    columns = ({"a": {}, "b": {}}, {"c": {"x": "a"}})
    small, large = (place(graphs, group(graphs, "1", *columns), sizes={"a": size}) for size in ((100, 100), (180, 300)))
    assert large.positions["b"][1] - small.positions["b"][1] == 200
    assert large.positions["c"][0] - small.positions["c"][0] == 80
    assert large.positions["c"][1] == small.positions["c"][1]
    assert large.sizes["b"][0] == 180, "nodes of a column are of one width"


def test_a_link_over_a_column_goes_around_what_stands_there_and_links_of_one_output_go_together(graphs):
    far = group(graphs, "1", {"a": {}}, {"b": {"x": "a"}}, {"c": {"x": "b", "y": "a"}}, {"d": {"x": "c", "y": "a"}})
    placed = place(graphs, far)
    assert ("b", "x") not in placed.last_turns, "to the next column a link needs no turns"
    heights = {placed.turns[placed.last_turns[name, "y"]].place[1] for name in "cd"}
    assert len(heights) == 1
    assert all(y < placed.box("b").top or y > placed.box("b").bottom for y in heights)
    way, turn = [], placed.last_turns["d", "y"]
    while turn is not None:
        way.insert(0, turn)
        turn = placed.turns[turn].before
    assert placed.last_turns["c", "y"] in way, "the longer one goes on from where the shorter one leaves"


def test_a_link_within_a_column_or_back_to_an_earlier_one_runs_between_the_nodes(graphs):
    rows = (group(graphs, "1", {"a": {}, "b": {"x": "a"}}, {"c": {"x": "a"}}), group(graphs, "2", {"d": {"x": "c"}}))
    placed = place(graphs, rows)
    for name in "bd":
        turn = placed.turns[placed.last_turns[name, "x"]]
        assert turn.place[0] < placed.box(name).left
        before = placed.turns[turn.before]
        assert before.place[1] == turn.place[1] and before.place[0] > placed.box(name).right
        assert not any(box.top <= turn.place[1] <= box.bottom for box in map(placed.box, "abcd"))
