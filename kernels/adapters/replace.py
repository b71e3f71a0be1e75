"""Functions of an installed package stand aside for ours, and come back."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib import import_module
from types import ModuleType
from typing import Any


class Replacements:
    """What `install` puts in place of a package's own functions, and `uninstall` takes away again.

    A function is replaced wherever a module of the package holds it, under any name: where it is defined and where
    it was imported to. Modules imported later find the replacement; code outside the package keeps what it imported.
    """

    def __init__(self, package: str, functions: Mapping[str, Mapping[str, Any]], *, skip_missing: bool = False) -> None:
        """
        Args:
            package: name of the trainer's package.
            functions: module -> name of the function there -> ours.
            skip_missing: leave out modules and functions that the installed version does not have.
        """
        self.package, self.functions, self.skip_missing = package, functions, skip_missing
        self._active: list[tuple[Any, Any]] = []

    def install(self) -> list[str]:
        """Replaces the functions; returns where ("module.name", sorted).

        Raises:
            RuntimeError: already installed.
            ImportError, AttributeError: the package lacks a module or a function (all of them with skip_missing);
                nothing is replaced then.
        """
        if self._active:
            raise RuntimeError(f"{self.package}: already installed")
        import_module(self.package)
        pairs = [(found, ours) for found, ours in self._pairs() if found is not None]
        if not pairs:
            raise AttributeError(f"{self.package}: none of the functions to replace is in the installed version")
        self._active = pairs
        return _swap(self.package, pairs)

    def uninstall(self) -> list[str]:
        """Undoes `install`, also in modules imported since; returns where. Does nothing where not installed."""
        pairs, self._active = self._active, []
        return _swap(self.package, [(ours, found) for found, ours in pairs])

    def original(self, ours: Any) -> Any:
        """What `ours` stands for. Raises RuntimeError where it stands for nothing."""
        for found, replacement in self._active:
            if replacement is ours:
                return found
        raise RuntimeError(f"{self.package}: not installed")

    def _pairs(self) -> list[tuple[Any, Any]]:
        """(the package's function or None, ours)."""
        pairs = []
        for name, functions in self.functions.items():
            module = self._module(name)
            for function, ours in functions.items():
                found = None if module is None else getattr(module, function, None)
                if found is None and not self.skip_missing:
                    raise AttributeError(f"{name} has no {function}: not the version this adapter was written for")
                pairs.append((found, ours))
        return pairs

    def _module(self, name: str) -> ModuleType | None:
        try:
            return import_module(name)
        except ModuleNotFoundError as error:
            if self.skip_missing and error.name is not None and name.startswith(error.name):
                return None
            raise


def _swap(package: str, pairs: list[tuple[Any, Any]]) -> list[str]:
    """In every loaded module of the package, the second of each pair for the first."""
    new = {id(old): replacement for old, replacement in pairs}
    changed = []
    for name, module in list(sys.modules.items()):
        if not isinstance(module, ModuleType) or not f"{name}.".startswith(f"{package}."):
            continue
        for attribute, value in list(vars(module).items()):
            if id(value) in new:
                setattr(module, attribute, new[id(value)])
                changed.append(f"{name}.{attribute}")
    return sorted(changed)
