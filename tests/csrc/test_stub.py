"""engine/_kv.pyi against the compiled module: the same classes, members, parameters, defaults and dtypes."""

import ast
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ppomax.engine import _kv

STUB = ast.parse((Path(__file__).parents[2] / "engine/_kv.pyi").read_text())
CLASSES = {node.name: node for node in STUB.body if isinstance(node, ast.ClassDef)}


def functions(cls: str) -> dict[str, ast.FunctionDef]:
    return {node.name: node for node in CLASSES[cls].body if isinstance(node, ast.FunctionDef)}


def properties(cls: str) -> dict[str, str]:
    """Name -> annotation."""
    return {name: ast.unparse(node.returns) for name, node in functions(cls).items() if node.decorator_list}  # type: ignore[arg-type]


def parameters(signature: str) -> list[str]:
    """`name`, `name=default` and `*` of a def line's parameters."""
    arguments = ast.parse(signature).body[0].args  # type: ignore[attr-defined]
    defaults = [None] * (len(arguments.args) - len(arguments.defaults)) + arguments.defaults
    shown = [a.arg + (f"={ast.unparse(d)}" if d else "") for a, d in zip(arguments.args, defaults, strict=True)]
    keywords = zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    return [*shown, *["*"] * bool(arguments.kwonlyargs), *(f"{a.arg}={ast.unparse(d)}" for a, d in keywords)]


def examples() -> dict[str, Any]:
    """An object of each class."""
    manager = _kv.KVCacheManager(9, 2, 2, 4)
    first = manager.submit(np.array([1, 2, 3]), np.array([1, 2]))
    manager.plan(8)
    step = manager.step(np.array([4, 4]), 0)
    objects = (manager, step, step.finished[0], manager.sequence(first + 1), manager.statistics)
    return {type(value).__name__: value for value in objects}


def test_classes() -> None:
    assert set(CLASSES) == set(examples()) == {name for name in vars(_kv) if not name.startswith("_")}


@pytest.mark.parametrize("cls", CLASSES)
def test_members(cls: str) -> None:
    compiled = {name for name in vars(getattr(_kv, cls)) if not name.startswith("_")}
    assert compiled | {"__init__"} == set(functions(cls)) | {"__init__"}
    in_module = {name for name in compiled if isinstance(vars(getattr(_kv, cls))[name], property)}
    assert in_module == set(properties(cls))


@pytest.mark.parametrize("method", sorted(set(functions("KVCacheManager")) - set(properties("KVCacheManager"))))
def test_signatures(method: str) -> None:
    documented = getattr(_kv.KVCacheManager, method).__doc__.splitlines()[0]
    node = functions("KVCacheManager")[method]
    assert parameters(f"def {documented}: ...") == parameters(ast.unparse(node))


@pytest.mark.parametrize("cls", CLASSES)
def test_types_of_properties(cls: str) -> None:
    example = examples()[cls]
    for name, annotation in properties(cls).items():
        value = getattr(example, name)
        if isinstance(value, np.ndarray):
            assert annotation == f"npt.NDArray[np.{value.dtype.name}]", name
        else:
            assert annotation.partition("[")[0] == type(value).__name__, name
