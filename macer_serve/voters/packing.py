"""How copies are packed into forward passes of two sizes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from macer_serve.smoothing.votes import Draw
from macer_serve.voters.tasks import Task

# What is left over goes into at most so many small passes, which several workers share, or else into a large one. On a
# CPU a small pass takes a quarter of the time of a large one; on a GPU it takes more than its share.
SMALL_PASSES = 4

Batch = list[tuple[int, Draw]]  # pieces of tasks' draws that one pass votes on, each with its task's number


def passes_of(copies: int, sizes: Sequence[int]) -> list[int]:
    """Returns the sizes of the passes that so many copies take; `sizes` are those of the voter, ascending."""
    small, large = sizes[0], sizes[-1]
    full, rest = divmod(copies, large)
    return [large] * full + ([large] if rest > SMALL_PASSES * small else [small] * -(-rest // small))


def packed(tasks: Sequence[Task], sizes: Sequence[int]) -> Iterator[Batch]:
    """Yields what each pass votes on, in the order of the tasks."""
    sizes = passes_of(sum(len(task.draw) for task in tasks), sizes)
    pieces = [(i, task.draw) for i, task in enumerate(tasks) if len(task.draw)][::-1]
    for room in sizes:
        batch: Batch = []
        while room and pieces:
            i, draw = pieces.pop()
            piece = replace(draw, stop=min(draw.stop, draw.start + room))
            batch.append((i, piece))
            room -= len(piece)
            if piece.stop < draw.stop:
                pieces.append((i, replace(draw, start=piece.stop)))
        yield batch
