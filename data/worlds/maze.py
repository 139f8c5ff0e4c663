"""`maze`: a lattice maze written as its edges, a start, a goal, and the path between them.

A maze is a random spanning tree of a square lattice. A text is

    CELL - CELL ;      for every edge, in random order and direction
    from START to GOAL path CELL CELL … GOAL end

and is filled up with `end`. A cell is one word. To write the path, the model must know which edges
there are. True variables:

    edge A-B     whether that edge is in the maze: known at the end of its own entry and after it
    cell         the cell that a word names
    position     the cell where the path is (in the path)
    next         the next cell towards the goal (in the path, before the goal)

After "Transformers Use Causal World Models in Maze-Solving Tasks" (arXiv 2412.11867), with a
generator of its own. No weights are shipped: `featureflow world train maze --steps 20000` makes
them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from annotated_types import Ge, Le
from jaxtyping import Int64
from typing_extensions import Doc

from data.worlds.base import NEVER, Variable, World

FROM, TO, PATH, END, JOIN, STOP = "from", "to", "path", "end", "-", ";"
Tree = dict[int, list[int]]


class Maze(World):
    """A maze as a list of edges, and the path through it."""

    kind: Literal["maze"] = "maze"
    size: Annotated[int, Ge(2), Le(8), Doc("cells of a side")] = 4
    n_layers: Annotated[int, Ge(1), Doc("blocks of the model")] = 4
    d_model: Annotated[int, Ge(16), Doc("width of the model, a multiple of 16")] = 128
    seed: Annotated[int, Ge(0), Doc("of nothing but the model's start")] = 0

    TRAINED: ClassVar[bool] = True
    STEERED: ClassVar[tuple[str, ...]] = ("position",)

    @property
    def n_cells(self) -> int:
        return self.size**2

    @property
    def n_context(self) -> int:
        """The start, the edges, `from A to B path`, the longest path, and one `end`."""
        return 1 + 4 * (self.n_cells - 1) + 5 + self.n_cells + 1

    @property
    def words(self) -> tuple[str, ...]:
        cells = (f"{chr(97 + i // self.size)}{i % self.size + 1}" for i in range(self.n_cells))
        return (*cells, FROM, TO, PATH, END, JOIN, STOP)

    def documents(self, n: int, seed: int) -> Iterator[str]:
        rng = np.random.default_rng([seed, 1])
        for _ in range(n):
            yield " ".join(self._document(rng))

    def _document(self, rng: np.random.Generator) -> list[str]:
        tree = _spanning_tree(self.size, rng)
        written: list[str] = []
        edges = [(a, b) for a, others in tree.items() for b in others if a < b]
        for place in rng.permutation(len(edges)):
            a, b = edges[place] if rng.random() < 0.5 else edges[place][::-1]
            written += [self.words[a], JOIN, self.words[b], STOP]
        start, goal = (int(cell) for cell in rng.choice(self.n_cells, 2, replace=False))
        written += [FROM, self.words[start], TO, self.words[goal], PATH]
        written += [self.words[cell] for cell in path_between(tree, start, goal)]
        return written + [END] * (self.n_context - 1 - len(written))

    def truth(
        self, ids: Int64[np.ndarray, "context position"], *, start: int = 0
    ) -> tuple[Variable, ...]:
        word = ids - 1
        cell = np.where((word >= 0) & (word < self.n_cells), word, NEVER)
        pairs = self._pairs
        edge = {pair: np.full(ids.shape, NEVER) for pair in pairs}
        position, following = np.full(ids.shape, NEVER), np.full(ids.shape, NEVER)
        for row, context in enumerate(ids):
            tree, at, _ = self.maze_of(context)
            for pair in pairs:
                edge[pair][row, at:] = pair[1] in tree[pair[0]]
            path = cell[row, at + 1 :]
            n = int((path != NEVER).argmin()) if (path == NEVER).any() else len(path)
            position[row, at + 1 : at + 1 + n] = path[:n]
            following[row, at + 1 : at + n] = path[1:n]
        names = self.words[: self.n_cells]
        found = [
            Variable(name="cell", value=cell, names=names, born=0),
            Variable(name="position", value=position, names=names, born=0, parents=("cell",)),
            Variable(name="next", value=following, names=names, born=1, parents=("position",)),
        ]
        for (a, b), value in edge.items():
            name = f"edge {names[a]}-{names[b]}"
            found.append(Variable(name=name, value=value, names=("absent", "there"), born=1))
        return tuple(found)

    def maze_of(self, context: Int64[np.ndarray, "position"]) -> tuple[Tree, int, int]:
        """The edges that a text names, the place of the word `path`, and the goal."""
        words = context - 1
        tree: Tree = {cell: [] for cell in range(self.n_cells)}
        join = self.words.index(JOIN)
        for place in np.flatnonzero(words == join):
            a, b = int(words[place - 1]), int(words[place + 1])
            tree[a].append(b)
            tree[b].append(a)
        at = int((words == self.words.index(PATH)).argmax())
        return tree, at, int(words[at - 1])

    def continuations(
        self, variable: str, value: int, ids: Int64[np.ndarray, "position"]
    ) -> tuple[tuple[str, ...], ...]:
        """Every cell that an edge joins to the position; `end` at the goal."""
        if variable != "position":
            return ()
        tree, _, goal = self.maze_of(ids)
        if value == goal:
            return ((END,),)
        return tuple((self.words[cell],) for cell in tree[value])

    def shape(self) -> dict[str, Any]:
        return {
            "n_layers": self.n_layers,
            "d_model": self.d_model,
            "n_heads": max(1, self.d_model // 16),
            "d_mlp": 4 * self.d_model,
            "n_context": self.n_context,
        }

    @property
    def _pairs(self) -> tuple[tuple[int, int], ...]:
        """Neighbouring cells of the lattice."""
        n = self.size
        across = [(i, i + 1) for i in range(n * n) if i % n < n - 1]
        return (*across, *((i, i + n) for i in range(n * (n - 1))))


def path_between(tree: Tree, start: int, goal: int) -> list[int]:
    """The cells from start to goal, both included; a tree has one path."""
    came_from, waiting = {start: start}, deque([start])
    while waiting:
        here = waiting.popleft()
        for cell in tree[here]:
            if cell not in came_from:
                came_from[cell] = here
                waiting.append(cell)
    path = [goal]
    while path[-1] != start:
        path.append(came_from[path[-1]])
    return path[::-1]


def _spanning_tree(size: int, rng: np.random.Generator) -> Tree:
    """Depth-first search in random order."""
    tree: Tree = {cell: [] for cell in range(size**2)}
    stack = [int(rng.integers(size**2))]
    seen = {stack[0]}
    while stack:
        here = stack[-1]
        row, column = divmod(here, size)
        around = [
            r * size + c
            for r, c in ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1))
            if 0 <= r < size and 0 <= c < size and r * size + c not in seen
        ]
        if not around:
            stack.pop()
            continue
        there = around[int(rng.integers(len(around)))]
        tree[here].append(there)
        tree[there].append(here)
        seen.add(there)
        stack.append(there)
    return tree
