"""The C++ core without Python: random operations under AddressSanitizer and UndefinedBehaviorSanitizer."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FLAGS = ["-std=c++20", "-g1", "-Wall", "-Wextra", "-Werror", "-D_GLIBCXX_ASSERTIONS"]
SANITIZERS = ["-O1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_random_operations_under_sanitizers(tmp_path: Path) -> None:
    core = [path for path in sorted((ROOT / "csrc").glob("*.cpp")) if path.name != "binding.cpp"]
    sources = [str(path) for path in (ROOT / "tests/csrc/stress.cpp", *core)]
    program = tmp_path / "stress"
    compiled = subprocess.run(
        ["g++", *FLAGS, *SANITIZERS, f"-I{ROOT / 'csrc'}", *sources, "-o", str(program)],
        capture_output=True,
        text=True,
    )
    assert compiled.returncode == 0, compiled.stderr
    for seed in range(4):
        run = subprocess.run([str(program), "100000", str(seed)], capture_output=True, text=True)
        assert (run.returncode, run.stdout) == (0, "ok\n"), f"seed {seed}: {run.stderr}"
