"""The one compiled part of ppomax: the KV-cache manager in csrc/. All other metadata stands in pyproject.toml."""

from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import setup

sources = sorted(str(path) for path in Path("csrc").glob("*.cpp"))
headers = sorted(str(path) for path in Path("csrc").glob("*.h"))

setup(
    ext_modules=[Pybind11Extension("ppomax.engine._kv", sources, depends=headers, cxx_std=20)],
    cmdclass={"build_ext": build_ext},
)
