"""The few words in which a graph is described: nodes in columns, columns in groups, groups in bands.

Nothing here says where anything stands; layout.py finds that out from how large the frontend draws each node.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Node:
    """A node of the host, or of a subgraph; widgets that are not named keep their default."""

    kind: str  # class of the node, or name of the subgraph
    values: Mapping[str, object] = field(default_factory=dict)  # widget -> value
    sources: Mapping[str, tuple[str, int]] = field(default_factory=dict)  # input -> (name of a node, its output)
    title: str = ""
    bypassed: bool = False  # there, and passed over until somebody presses Ctrl+B


Column = Mapping[str, Node]  # from the top down


@dataclass(frozen=True)
class Group:
    """Columns of nodes under one title, from left to right."""

    title: str
    colour: str
    columns: tuple[Column, ...]


@dataclass(frozen=True)
class Graph:
    """Bands of groups from left to right; the groups of a band stand below each other and share its columns.

    A group without a title is drawn as no group: the note.
    """

    bands: tuple[tuple[Group, ...], ...]

    @property
    def nodes(self) -> dict[str, Node]:
        """All nodes by name, in the order in which they are numbered."""
        return {name: node for group in self.groups for column in group.columns for name, node in column.items()}

    @property
    def groups(self) -> Iterator[Group]:
        return (group for band in self.bands for group in band)


@dataclass(frozen=True)
class Subgraph:
    """Nodes that are shown as one. Its inputs and widgets feed inner nodes, its outputs are theirs."""

    name: str
    category: str
    description: str
    columns: tuple[Column, ...]
    inputs: Mapping[str, tuple[tuple[str, str], ...]]  # name outside -> (inner node, its input) for each that it feeds
    widgets: Mapping[str, tuple[tuple[str, str], ...]]  # the same for widgets
    outputs: Mapping[str, tuple[str, int]]  # name outside -> (inner node, its output)

    @property
    def nodes(self) -> dict[str, Node]:
        return {name: node for column in self.columns for name, node in column.items()}
