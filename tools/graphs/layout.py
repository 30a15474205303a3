"""Where everything stands: columns beside each other, nodes below each other, links around the nodes between.

All numbers are the frontend's: a node's position is the corner of its body, its title stands above that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from .describe import Graph, Node

TITLE = 30  # height of a node's title
SLOT = 20  # from one input or output to the next
BETWEEN_COLUMNS = 150
BETWEEN_NODES = 56
BETWEEN_GROUPS = 110
MARGIN = 25  # of a group around its nodes
GROUP_TITLE = 50
CLEAR = 12  # between a link and a node that it passes
LANE = 16  # between two links beside each other
OFF = 45  # between a node and a turn, because the frontend swings a link out on both sides of it

Size = tuple[int, int]


@dataclass(frozen=True)
class Box:
    """A rectangle; the bottom and right edges are one past the last pixel."""

    left: float
    top: float
    right: float
    bottom: float

    def meets(self, other: Box, margin: float = 0) -> bool:
        return (
            self.left < other.right + margin
            and other.left < self.right + margin
            and self.top < other.bottom + margin
            and other.top < self.bottom + margin
        )

    def around(self, other: Box) -> Box:
        return Box(
            min(self.left, other.left),
            min(self.top, other.top),
            max(self.right, other.right),
            max(self.bottom, other.bottom),
        )


@dataclass(frozen=True)
class Turn:
    """A point that a link runs through, with the point before it on the way from the node that it leaves."""

    place: tuple[int, int]
    before: int | None  # number of that turn; None: the node


@dataclass(frozen=True)
class Placed:
    positions: Mapping[str, tuple[int, int]]
    sizes: Mapping[str, Size]
    groups: tuple[tuple[str, str, Box], ...]  # title, colour, place
    turns: tuple[Turn, ...]
    last_turns: Mapping[tuple[str, str], int]  # (node, input) -> the last turn of the link that ends there

    def box(self, name: str) -> Box:
        (x, y), (width, height) = self.positions[name], self.sizes[name]
        return Box(x, y - TITLE, x + width, y + height)


def place(graph: Graph, size_of: Callable[[Node], Size], slot_of: Callable[[Node, str], int]) -> Placed:
    """`slot_of` says the how-manieth a node's input is."""
    sizes = {name: size_of(node) for name, node in graph.nodes.items()}
    positions, groups, x = {}, [], 0
    for band in graph.bands:
        count = max(len(group.columns) for group in band)
        columns = [[g.columns[i] for g in band if i < len(g.columns)] for i in range(count)]
        widths = [max(sizes[name][0] for column in stack for name in column) for stack in columns]
        y = 0
        for group in band:
            inner = y + (GROUP_TITLE + MARGIN if group.title else 0)
            bottom, left = inner, x
            for column, width in zip(group.columns, widths, strict=False):
                top = inner
                for name in column:
                    positions[name] = (left, top + TITLE)
                    sizes[name] = (width, sizes[name][1])
                    top += TITLE + sizes[name][1] + BETWEEN_NODES
                bottom = max(bottom, top - BETWEEN_NODES)
                left += width + BETWEEN_COLUMNS
            if group.title:
                box = Box(x - MARGIN, y, left - BETWEEN_COLUMNS + MARGIN, bottom + MARGIN)
                groups.append((group.title, group.colour, box))
            y = bottom + MARGIN + BETWEEN_GROUPS
        x += sum(widths) + BETWEEN_COLUMNS * count + 2 * MARGIN
    placed = Placed(positions, sizes, tuple(groups), (), {})
    turns, last = _routes(graph, placed, slot_of)
    return Placed(positions, sizes, tuple(groups), tuple(turns), last)


# --------------------------------------------------------------------------------------------------------------- links

Output = tuple[str, int]  # name of a node, number of its output


@dataclass(frozen=True)
class _Link:
    source: Output
    name: str  # of the node that it goes to
    entry: str  # that node's input
    start: tuple[float, float]
    end: tuple[float, float]

    @property
    def backwards(self) -> bool:
        return self.end[0] <= self.start[0]

    @property
    def reach(self) -> tuple[float, float]:
        """Of its straight part, from left to right."""
        return (self.end[0], self.start[0]) if self.backwards else (self.start[0], self.end[0])


@dataclass(frozen=True)
class _Lane:
    """The straight part of a link."""

    y: float
    link: _Link


def _routes(graph: Graph, placed: Placed, slot_of) -> tuple[list[Turn], dict[tuple[str, str], int]]:
    """Turns for every link that would run under a node: along a free height, and up or down between two columns."""
    boxes = {name: placed.box(name) for name in graph.nodes}
    titles = [Box(b.left, b.top, b.right, b.top + GROUP_TITLE - MARGIN) for *_, b in placed.groups]
    links = []
    for name, node in graph.nodes.items():
        for entry, source in node.sources.items():
            start = boxes[source[0]].right, placed.positions[source[0]][1] + SLOT * (source[1] + 0.7)
            end = boxes[name].left, placed.positions[name][1] + SLOT * (slot_of(node, entry) + 0.7)
            links.append(_Link(source, name, entry, start, end))
    turns: list[Turn] = []
    last: dict[tuple[str, str], int] = {}
    lanes: list[_Lane] = []
    # the shortest first, so that longer ones go on from where those left
    for link in sorted(links, key=lambda link: abs(link.end[0] - link.start[0])):
        near = {link.source[0], link.name} if not link.backwards else set()
        between = [b for n, b in boxes.items() if n not in near and b.right > link.reach[0] and b.left < link.reach[1]]
        direct = Box(link.start[0], min(link.start[1], link.end[1]), link.end[0], max(link.start[1], link.end[1]))
        if not link.backwards and not any(box.meets(direct, CLEAR) for box in between):
            continue
        over = [box for box in titles if box.right > link.reach[0] and box.left < link.reach[1]]
        lane = _Lane(_free_height(between + over, lanes, link), link)
        last[link.name, link.entry] = _turned(turns, lanes, lane)
        lanes.append(lane)
    return turns, last


def _turned(turns: list[Turn], lanes: list[_Lane], lane: _Lane) -> int:
    """Adds the turns of a link; returns the last. Links of one output share theirs as far as they go together."""
    link = lane.link
    others = [each.link for each in lanes if each.link.source != link.source]
    leave = link.start[0] + OFF + 8 * (len({o.source for o in others if abs(o.start[0] - link.start[0]) < BETWEEN_COLUMNS}) % 7)
    arrive = link.end[0] - OFF - 8 * (len({o.source for o in others if abs(o.end[0] - link.end[0]) < BETWEEN_COLUMNS}) % 7)
    together = {number for each in lanes if each.link.source == link.source and each.y == lane.y for number in _way(turns, each)}
    if link.backwards or not together:
        turns.append(Turn((round(leave), round(lane.y)), None))
        before = len(turns) - 1
    else:
        before = max((n for n in together if turns[n].place[0] < link.end[0]), key=lambda n: turns[n].place[0])
    if abs(turns[before].place[0] - arrive) < BETWEEN_COLUMNS / 2:
        return before
    turns.append(Turn((round(arrive), round(lane.y)), before))
    return len(turns) - 1


def _way(turns: list[Turn], lane: _Lane) -> list[int]:
    """The turns on a lane of an earlier link of the same output."""
    leave, arrive = sorted((lane.link.start[0], lane.link.end[0]))
    return [n for n, turn in enumerate(turns) if turn.place[1] == round(lane.y) and leave <= turn.place[0] <= arrive]


def _free_height(between: list[Box], lanes: list[_Lane], link: _Link) -> float:
    """The height nearest to both ends at which a straight line meets no node and no other output's straight line."""
    edges = [(box.top - CLEAR, box.bottom + CLEAR) for box in between]
    candidates = {y for edge in edges for y in edge} | {link.start[1], link.end[1]}
    candidates |= {y + LANE * step for y in set(candidates) for step in range(-12, 13)}
    beside = [each for each in lanes if each.link.reach[0] < link.reach[1] and link.reach[0] < each.link.reach[1]]
    shared = {each.y for each in lanes if each.link.source == link.source}
    taken = [each.y for each in beside if each.link.source != link.source]

    def free(y: float) -> bool:
        return not any(top < y < bottom for top, bottom in edges) and not any(abs(y - other) < LANE for other in taken)

    def cost(y: float) -> float:
        return abs(y - link.start[1]) + abs(y - link.end[1]) - (400 if y in shared else 0)

    return min((y for y in sorted(candidates | shared) if free(y)), key=cost)
