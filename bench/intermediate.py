"""What a kernel loads and stores, read off the intermediate representations that Triton keeps of it.

Triton's own IR says what goes through each pointer argument: blocks or single values, in a loop or not. LLVM's says how
wide the accesses became.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

_MEMORY = re.compile(r"tt\.(?:descriptor_)?(load|store|gather|scatter|atomic|descriptor_reduce)(?:_\w+)?")
_ASM = re.compile(r"(?<![a-z.])(ld|st|atom|red|cp\.async)((?:\.[\w:]+)*\.global(?:[.:]\w+)*)")
_PLAIN = re.compile(r"\b(load|store) (?:volatile )?(?:<(\d+) x )?(i\d+|half|bfloat|float|double)\b")
_FLOATS = {"half": 16, "bfloat": 16, "float": 32, "double": 64}
_LOADING, _STORING = ("load", "gather"), ("store", "scatter")


class Access(NamedTuple):
    """All loads, or all stores, that a kernel makes through one of its pointer arguments."""

    argument: str
    stores: bool
    block: bool  # of blocks of values, not of single ones alone
    elements: float  # of a program; inf where a loop makes them
    widest: int  # bytes of a thread in the widest of them; bulk copies count as 16


class _Operation(NamedTuple):
    arguments: frozenset[str]
    stores: bool
    elements: float
    block: bool
    bulk: bool


def accesses(ttir: str, llir: str) -> Iterator[Access]:
    widths = _widths(llir, _parameters(ttir))
    found: dict[tuple[str, bool], list[_Operation]] = defaultdict(list)
    for operation in _operations(ttir):
        for argument in operation.arguments:
            found[argument, operation.stores].append(operation)
    for (argument, stores), some in sorted(found.items()):
        bulk = 16 if any(operation.bulk for operation in some) else 0
        yield Access(
            argument,
            stores,
            block=any(operation.block for operation in some),
            elements=sum(operation.elements for operation in some),
            widest=max(bulk, widths.get((argument, stores), 0)),
        )


def _parameters(ttir: str) -> list[str]:
    """Names of the kernel's parameters in order; constants are none."""
    return re.findall(r"%([\w.]+): ", next(line for line in ttir.splitlines() if "tt.func public" in line))


def _operations(ttir: str) -> Iterator[_Operation]:
    """Loads and stores in the order of the text; an atomic is both."""
    roots: dict[str, frozenset[str]] = {}
    regions: list[bool] = []  # whether each of the regions around the line is a loop's
    for line in ttir.splitlines():
        if "tt.func public" in line:
            roots.update({name: frozenset([name]) for name in re.findall(r"%([\w.]+): !tt\.(?:ptr|tensordesc)", line)})
        for inner, outer in re.findall(r"%([\w#.]+) = %([\w#.]+)", line):  # what a loop carries
            roots[inner] = roots.get(outer, frozenset())
        if line.lstrip().startswith("}"):
            regions.pop()
        if line.rstrip().endswith("{"):
            regions.append(bool(re.search(r"\bscf\.(?:for|while)\b|^\s*} do", line)))
        text = line.split(" loc(")[0]
        operation = re.match(r"\s*(?:%(\w+)(?::\d+)? = )?(tt\.\w+|arith\.select)\s(.*)", text)
        if operation is None:
            continue
        result, name, rest = operation.groups()
        through = _through(name, rest, roots)
        if result is not None:
            roots[result] = through
        if kind := _MEMORY.fullmatch(name):
            if not through:
                raise ValueError(f"cannot tell which of the kernel's pointers this goes through: {text.strip()}")
            yield from _touched(kind[1], rest, through, "descriptor" in name, any(regions))


def _through(name: str, rest: str, roots: dict[str, frozenset[str]]) -> frozenset[str]:
    """The kernel's pointers behind the first operand, or behind both that a select chooses from."""
    operands = re.findall(r"%([\w#.]+)", rest)
    taken = operands[1:3] if name == "arith.select" else operands[:1]
    return frozenset().union(*(roots.get(operand, frozenset()) for operand in taken))


def _touched(kind: str, rest: str, arguments: frozenset[str], bulk: bool, looped: bool) -> Iterator[_Operation]:
    shape = re.findall(r"tensor<((?:\d+x)*)", rest)
    elements = math.prod(int(size) for size in shape[-1].split("x")[:-1]) if shape else 1
    counted = math.inf if looped else float(elements)
    for stores in (False, True):
        if kind not in (_STORING, _LOADING)[stores]:
            yield _Operation(arguments, stores, counted, bool(shape), bulk)


def _widths(llir: str, arguments: Sequence[str]) -> dict[tuple[str, bool], int]:
    """Bytes of the widest access of a thread by (argument, whether it stores)."""
    behind = _pointers(llir)
    widest: dict[tuple[str, bool], int] = defaultdict(int)
    for line in llir.splitlines():
        for pointer, stores, width in _line_accesses(line):
            for number in _parameters_behind(pointer, behind):
                if number < len(arguments):  # scratch memory of Triton's own follows
                    key = arguments[number], stores
                    widest[key] = max(widest[key], width)
    return widest


def _line_accesses(line: str) -> Iterator[tuple[str, bool, int]]:
    """(pointer, whether it stores, bytes) of an instruction on global memory."""
    pointer = re.search(r"ptr addrspace\(1\) (%[\w.]+)", line)
    if pointer is None or "getelementptr" in line:
        return
    if code := _ASM.search(line):
        name, modifiers = code.groups()
        yield pointer[1], name not in ("ld", "cp.async"), _asm_width(name, modifiers, line)
        if name == "atom":
            yield pointer[1], False, _asm_width(name, modifiers, line)
    elif plain := _PLAIN.search(line):
        bits = _FLOATS[plain[3]] if plain[3] in _FLOATS else int(plain[3][1:])
        yield pointer[1], plain[1] == "store", int(plain[2] or 1) * bits // 8


def _asm_width(name: str, modifiers: str, line: str) -> int:
    if name == "cp.async":
        size = re.search(r"\], (0x[0-9a-f]+|\d+)", line)
        return int(size[1], 0) if size else 16
    vector = re.search(r"\.v(\d)", modifiers)
    bits = re.search(r"\.[bfsu](?:f)?(\d+)", modifiers)
    return int(vector[1] if vector else 1) * (int(bits[1]) if bits else 32) // 8


def _pointers(llir: str) -> dict[str, list[str]]:
    """Each global pointer's sources: the base of its getelementptr, what a phi or select joins."""
    behind: dict[str, list[str]] = {}
    for line in llir.splitlines():
        definition = re.match(r"\s*(%[\w.]+) = (getelementptr|phi|select|addrspacecast|bitcast)\b(.*)", line)
        if definition is None or "ptr addrspace(1)" not in line:
            continue
        name, kind, rest = definition.groups()
        if kind == "phi":
            behind[name] = re.findall(r"\[ (%[\w.]+),", rest)
        else:
            behind[name] = re.findall(r"ptr addrspace\(1\) (%[\w.]+)", rest)
    return behind


def _parameters_behind(pointer: str, behind: dict[str, list[str]]) -> Iterable[int]:
    """Numbers of the kernel's parameters that a pointer comes from."""
    seen, todo, found = set(), [pointer], set()
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        if name in behind:
            todo += behind[name]
        elif name[1:].isdigit():
            found.add(int(name[1:]))
    return found
