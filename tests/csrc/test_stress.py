"""The C++ core without Python: random operations under AddressSanitizer and UndefinedBehaviorSanitizer."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FLAGS = ["-std=c++20", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-D_GLIBCXX_ASSERTIONS"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_random_operations_under_sanitizers(tmp_path: Path) -> None:
    sources = [ROOT / "tests/csrc/stress.cpp", ROOT / "csrc/block_pool.cpp", ROOT / "csrc/cache_manager.cpp"]
    program = tmp_path / "stress"
    compiled = subprocess.run(
        ["g++", *FLAGS, *SANITIZERS, f"-I{ROOT / 'csrc'}", *map(str, sources), "-o", str(program)],
        capture_output=True,
        text=True,
    )
    assert compiled.returncode == 0, compiled.stderr
    run = subprocess.run([str(program), "30000", "0"], capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (0, "ok\n"), run.stderr
