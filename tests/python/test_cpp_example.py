"""The C++ example, built the way a C++ user would: find_package against an installed library."""

import shutil
import subprocess
from pathlib import Path

import blackwell_sparsek
import pytest

_ROOT = Path(__file__).resolve().parents[2]


def _build_tree() -> Path | None:
    """The CMake build tree that the package was imported from; None for an installed package."""
    tree = Path(blackwell_sparsek.__file__).absolute().parents[2]
    return tree if (tree / "cmake_install.cmake").exists() else None


def test_cpp_example_builds_and_runs(tmp_path):
    cmake, tree = shutil.which("cmake"), _build_tree()
    if cmake is None:
        pytest.skip("cmake is not on PATH")
    if tree is None:
        pytest.skip(
            "the package was not imported from a build tree, so there is no library to install"
        )

    def run(*command: str | Path) -> str:
        result = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    prefix, build = tmp_path / "prefix", tmp_path / "build"
    run(cmake, "--install", tree, "--prefix", prefix)
    run(cmake, "-S", _ROOT / "examples", "-B", build, f"-DCMAKE_PREFIX_PATH={prefix}")
    run(cmake, "--build", build)
    output = run(build / "01_forward")
    assert "largest difference to the fp64 reference" in output
