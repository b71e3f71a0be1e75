"""What gets installed: the contents of the sdist and of the wheel built from it, and names that must stay free."""

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def source_files() -> list[Path]:
    """Relative paths of the project's own files: what git tracks, or would."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: the project's own files cannot be told from build products")
    command = ["git", "ls-files", "-co", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()
    return [Path(name) for name in listed if (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel built from the sdist, of a clean copy of the sources."""
    copy, out = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("dist")
    for path in source_files():
        (copy / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, copy / path)
    build = subprocess.run(
        [sys.executable, "-m", "build", "--outdir", str(out), str(copy)], capture_output=True, text=True
    )
    assert build.returncode == 0, build.stdout + build.stderr
    return out


@pytest.fixture(scope="module")
def wheel(distributions: Path) -> Path:
    (path,) = distributions.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def wheel_names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_sdist_builds_from_itself(distributions: Path) -> None:
    (sdist,) = distributions.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    csrc = {path.as_posix() for path in source_files() if path.parts[0] == "csrc"}
    assert any(name.endswith(".h") for name in csrc)
    assert csrc | {"LICENSE", "README.md", "setup.py"} <= names


def test_wheel_has_every_module_and_nothing_else(wheel_names: set[str]) -> None:
    shipped = {".py", ".pyi", ".typed", ".json"}
    expected = {
        f"ppomax/{path.as_posix()}"
        for path in source_files()
        if path.parts[0] in ("engine", "kernels") and path.suffix in shipped
    }
    (extension,) = (name for name in wheel_names if name.startswith("ppomax/engine/_kv.") and name.endswith(".so"))
    assert {"ppomax/engine/_kv.pyi", "ppomax/engine/py.typed", "ppomax/kernels/py.typed"} <= expected
    assert {name for name in wheel_names if ".dist-info/" not in name} == expected | {extension}
    assert any(name.endswith("licenses/LICENSE") for name in wheel_names)


def test_ppomax_and_kernels_are_namespaces(wheel_names: set[str]) -> None:
    assert not {"ppomax/__init__.py", "ppomax/kernels/__init__.py"} & wheel_names


def run_python(code: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *arguments], cwd=cwd, capture_output=True, text=True)


def test_unpacked_wheel_imports(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import ppomax.engine._kv as kv; print(kv.__file__); "
        "kv.KVCacheManager(2, 1, 1, 1).check_integrity()"
    )
    run = run_python(code, str(tmp_path), cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert tmp_path in Path(run.stdout.strip()).parents


def test_root_on_the_path_hides_no_kernels_package() -> None:
    """Hugging Face's `kernels` must win over our folder of that name, so ours must not be a regular package."""
    code = "import importlib.util as u; s = u.find_spec('kernels'); print((s and s.origin) or '')"
    run = run_python(code, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    origin = run.stdout.strip()
    assert not origin or (ROOT / "kernels") not in Path(origin).parents


def test_engine_is_not_a_name_of_its_own() -> None:
    run = run_python("import engine", cwd=ROOT)
    assert run.returncode != 0
    assert "ImportError: imported as 'engine': the package is called ppomax.engine" in run.stderr
