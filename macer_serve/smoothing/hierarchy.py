"""Hierarchies: partitions of the classes into named groups, each partition coarser than the one before.

A hierarchy is written as a list of partitions, the finest first. Classes are given by name or by number:

    - animal: [bird, cat, deer, dog, frog, horse]
      vehicle: [airplane, automobile, ship, truck]

Level 0 is the classes themselves, level 1 the first partition, and so on. If classes are replaced by the groups of a
partition, the theorem of randomized smoothing holds for the groups: the votes of a group are the sum of its classes'.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from macer_serve.errors import ParameterError
from macer_serve.smoothing.votes import Votes

Partition = tuple[tuple[str, tuple[int, ...]], ...]  # (name, class numbers) per group

MAX_LEVELS = 32
LONGEST_NAME = 200  # every certificate repeats it


@dataclass(frozen=True)
class Hierarchy:
    """The partitions, the finest first. Groups and their classes are in the order of their class numbers.

    Raises `ParameterError` at construction unless each partition puts each class into one group, has at least two
    groups, and joins groups of the partition before into fewer groups.
    """

    levels: tuple[Partition, ...]

    def __post_init__(self) -> None:
        if not 1 <= len(self.levels) <= MAX_LEVELS:
            raise ParameterError(f"a hierarchy has 1 to {MAX_LEVELS} levels, not {len(self.levels)}")
        ordered = tuple(
            tuple(sorted(((name, tuple(sorted(members))) for name, members in level), key=lambda group: group[1][:1]))
            for level in self.levels
        )
        object.__setattr__(self, "levels", ordered)
        for number, level in enumerate(self.levels, start=1):
            if fault := _fault(level, range(self.classes)) or (
                number > 1 and _not_coarser(self.levels[number - 2], level)
            ):
                raise ParameterError(f"hierarchy, level {number}: {fault}")

    @cached_property
    def classes(self) -> int:
        """The number of classes that are grouped."""
        return 1 + max((c for _, members in self.levels[0] for c in members), default=-1)

    def names(self, level: int) -> tuple[str, ...]:
        """Returns the names of the groups of a level from 1 on."""
        return tuple(name for name, _ in self.levels[level - 1])

    def totals(self, votes: Votes, level: int) -> Votes:
        """Returns the votes of each group, `[groups]`, from hard votes per class. At level 0 these are the votes."""
        if level == 0:
            return votes
        totals = np.zeros(len(self.levels[level - 1]), dtype=np.int64)
        np.add.at(totals, self._group_of[level - 1], votes)
        return totals

    @cached_property
    def _group_of(self) -> tuple[npt.NDArray[np.intp], ...]:
        return tuple(_groups_by_class(level, self.classes) for level in self.levels)

    def to_json(self, classes: Sequence[str] | None = None) -> list[dict[str, list[Any]]]:
        """Returns the partitions as a person writes them, classes by number, or by the names in `classes`."""
        by_name = classes is not None and len(set(classes)) == len(classes)
        return [
            {name: [classes[c] if by_name and classes else c for c in members] for name, members in level}
            for level in self.levels
        ]

    @classmethod
    def from_json(cls, data: Any, classes: Sequence[str] | None = None) -> Hierarchy:
        """Returns the hierarchy that a person wrote, or that `to_json` returned. One partition may stand without list.

        With `classes`, the names of all classes, classes may be given by name. A group of several classes must then
        not have the name of a class. Raises `ParameterError`, which says what is wrong.
        """
        data = [data] if isinstance(data, dict) else data
        if not isinstance(data, list) or not all(isinstance(level, dict) for level in data):
            raise ParameterError("a hierarchy is a list of partitions, each like {animal: [cat, dog], vehicle: [ship]}")
        numbers: dict[str, list[int]] = {}
        for number, name in enumerate(classes or ()):
            numbers.setdefault(name, []).append(number)
        levels = tuple(_partition(level, at, numbers) for at, level in enumerate(data, start=1))
        for at, level in enumerate(levels, start=1):
            if classes is not None and (fault := _fault(level, classes)):  # by names, which the constructor lacks
                raise ParameterError(f"hierarchy, level {at}: {fault}")
        hierarchy = cls(levels)
        if classes is not None:
            hierarchy.check(classes)
        return hierarchy

    def check(self, classes: Sequence[str]) -> None:
        """Raise `ParameterError` unless these can be the names of the classes that are grouped."""
        if self.classes != len(classes):
            missing = [classes[c] for c in range(self.classes, len(classes))][:3]
            words = f"{', '.join(missing)} are in no group" if missing else f"there are only {len(classes)} classes"
            raise ParameterError(f"hierarchy, level 1: {words}")
        known = set(classes)
        for at, level in enumerate(self.levels, start=1):
            for name, members in level:
                if name in known and [classes[c] for c in members] != [name]:
                    raise ParameterError(
                        f"hierarchy, level {at}: group {name!r} has the name of a class, and other classes in it: "
                        "choose another name"
                    )


def _partition(level: dict[Any, Any], at: int, numbers: dict[str, list[int]]) -> Partition:
    groups = []
    for name, members in level.items():
        if not isinstance(members, list) or not members:
            raise ParameterError(f"hierarchy, level {at}: group {str(name)[:60]!r} needs a list of its classes")
        groups.append((name, tuple(_class_number(member, at, numbers) for member in members)))
    return tuple(groups)


def _class_number(member: Any, at: int, numbers: dict[str, list[int]]) -> int:
    if type(member) is int and 0 <= member < 2**31:
        return member
    found = numbers.get(member, []) if isinstance(member, str) else []
    if not found:
        known = f"; classes are {', '.join([*numbers][:10])}{', ...' * (len(numbers) > 10)}" if numbers else ""
        raise ParameterError(f"hierarchy, level {at}: there is no class {str(member)[:60]!r}{known}")
    if len(found) > 1:
        raise ParameterError(f"hierarchy, level {at}: several classes are called {member!r}: give their numbers")
    return found[0]


def _fault(level: Partition, classes: Sequence[str] | range) -> str | None:
    """Returns what is wrong with a partition of the classes, which are called as in `classes`, or None."""
    names = [name for name, _ in level]
    for name in names:
        if not isinstance(name, str) or not name.strip() or len(name) > LONGEST_NAME or not name.isprintable():
            return (
                f"{str(name)[:60]!r} is no name: 1 to {LONGEST_NAME} printable characters, in quotes if it is a number"
            )
    if len(set(names)) < len(names):
        return f"two groups are called {next(name for name in names if names.count(name) > 1)!r}"
    placed = sorted(c for _, members in level for c in members)
    if double := [c for c, after in pairwise(placed) if c == after]:
        called = classes[double[0]] if double[0] < len(classes) else double[0]
        return f"class {called} is in two groups, or twice in one"
    if missing := set(range(len(classes))) - set(placed):
        return f"class {classes[min(missing)]} is in no group"
    if placed and placed[-1] >= len(classes):
        return f"there is no class {placed[-1]}"
    if len(names) < 2:
        return "at least two groups are needed: a single group says nothing"
    if len(names) == len(classes):
        return "every class is a group of its own: that is level 0"
    return None


def _not_coarser(finer: Partition, coarser: Partition) -> str | None:
    """Returns what keeps a partition from being coarser than the one before it, or None."""
    classes = sum(len(members) for _, members in finer)
    group_of = _groups_by_class(coarser, classes)
    for name, members in finer:
        if len(set(group_of[list(members)].tolist())) > 1:
            return f"group {name!r} of the level before is divided: each level must join whole groups"
    if len(coarser) == len(finer):
        return "it has the groups of the level before"
    return None


def _groups_by_class(level: Partition, classes: int) -> npt.NDArray[np.intp]:
    """Returns the number of each class's group, `[classes]`."""
    found = np.zeros(classes, dtype=np.intp)
    for number, (_, members) in enumerate(level):
        found[list(members)] = number
    return found
