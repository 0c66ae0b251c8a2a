"""What a pickle would do, found by reading its operations: it is refused before anything of it is loaded.

torch's restricted unpickler executes no code of a file's choice, but it calls functions that allocate any memory, and
hashes keys whose hash takes exponential time. Here a pickle may name plain tensors only, and the work of its operations
and the nesting of its objects are bounded.
"""

from __future__ import annotations

import io
import pickletools
import re
from typing import Any

MAX_OPERATIONS = 1_000_000  # a ResNet-152 with its optimiser's state has about 100,000
_MAX_WORK = 100_000_000  # objects that all operations take, a shared part counted as often as it is named
_MAX_NESTING = 50  # of tuples: hashing them recurses in C
_PICKLES = 5  # at the start of a file of torch's older format
_ALLOWED = re.compile(
    r"collections (OrderedDict|Counter)|(__builtin__|builtins) set|torch (Size|device)|torch\.nn\.parameter Parameter"
    r"|torch\._utils (_rebuild_tensor|_rebuild_tensor_v2|_rebuild_parameter)"
    r"|torch (Float|Double|Half|BFloat16|Long|Int|Short|Char|Byte|Bool)Storage|torch (bool|b?float(16|32|64)|u?int\d+)"
)
_IN_PLACE = {"APPEND", "APPENDS", "SETITEM", "SETITEMS", "BUILD"}  # into the object below what they take
_CALLS = {"GLOBAL", "INST", "STACK_GLOBAL", "EXT1", "EXT2", "EXT4"}

# The number of objects in an object on the stack, and how deeply tuples are nested in it.
_Measure = tuple[int, int]
_MARK: _Measure = (-1, 0)


class RefusedPickleError(Exception):
    """Its message says why a pickle is refused."""


def require_plain(data: bytes, *, older_format: bool = False) -> None:
    """Raise `RefusedPickleError` for a pickle that names more than plain tensors, or whose objects are too large.

    A file of torch's older format starts with several pickles, whose data follow. Raises `ValueError` or `IndexError`
    for a damaged pickle.
    """
    file = io.BytesIO(data)
    for _ in range(_PICKLES if older_format else 1):
        _walk(file)


def _walk(file: io.BytesIO) -> None:
    """Reads one pickle."""
    operations = work = 0
    stack: list[_Measure] = []
    memo: dict[int, _Measure] = {}
    argument: Any
    for operation, argument, _ in pickletools.genops(file):
        name = operation.name
        if name in _CALLS and not (name == "GLOBAL" and _ALLOWED.fullmatch(argument)):
            what = _python_3(argument).replace(" ", ".") if isinstance(argument, str) else "a function"
            raise RefusedPickleError(
                f"loading it would call {what[:100]}, and only files that hold nothing but plain tensors are loaded"
            )
        operations += 1
        if operations > MAX_OPERATIONS:
            raise RefusedPickleError(f"it has more than {MAX_OPERATIONS:,} operations")
        if name.endswith("PUT"):
            memo[argument] = stack[-1]
            continue
        if name.endswith("GET"):
            if argument not in memo:
                raise ValueError("it names an object that is not there")
            stack.append(memo[argument])
            continue
        popped = _popped(stack, operation)
        objects = 1 + sum(count for count, _ in popped)
        nesting = max((depth for _, depth in popped), default=0) + name.startswith("TUPLE")
        work += sum(count for count, _ in (popped[:-1] if name in _IN_PLACE else popped))
        if work > _MAX_WORK or nesting > _MAX_NESTING:
            raise RefusedPickleError("its objects are nested too deeply, or named too often")
        for kind in operation.stack_after:
            stack.append(_MARK if kind is pickletools.markobject else (objects, nesting))


def _popped(stack: list[_Measure], operation: pickletools.OpcodeInfo) -> list[_Measure]:
    """Takes from the stack what an operation takes; returns it."""
    before = operation.stack_before
    popped: list[_Measure] = []
    if pickletools.markobject in before:
        while (top := stack.pop()) is not _MARK:
            popped.append(top)
        before = before[: before.index(pickletools.markobject)]
    popped += [stack.pop() for _ in before]
    return popped


def _python_3(name: str) -> str:
    return re.sub(r"^__builtin__ ", "builtins ", name)
