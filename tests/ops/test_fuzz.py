"""Random cases through `csrc/core` itself: under sanitizers, which see what no Python test can, and on aarch64.

A case that fails prints its seed; `fuzz 1 SEED` repeats it. By hand, for more of them:

    cmake -S tests/ops/fuzz -B build/fuzz -DCMAKE_CXX_FLAGS="-g1 -fno-sanitize-recover=all -fsanitize=address,undefined"
    cmake --build build/fuzz && build/fuzz/fuzz CASES FIRST_SEED
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from machine import missing

SOURCE = Path(__file__).with_name("fuzz")
SANITIZED = "-g1 -fno-omit-frame-pointer -fno-sanitize-recover=all -fsanitize="
CASES = 10_000
CROSS_COMPILER = "aarch64-linux-gnu-g++"

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="sanitizers and fork are used as on Linux")


def build(folder: Path, *definitions: str) -> Path:
    """The fuzz program, with csrc/core built by the project's own CMakeLists.txt."""
    options = [f"-D{definition}" for definition in definitions]
    for command in (["cmake", "-S", SOURCE, "-B", folder, "-G", "Ninja", *options], ["cmake", "--build", folder]):
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
    return folder / "fuzz"


def run(*command: str | Path | int) -> str:
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[:10_000] + result.stdout
    return result.stdout


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("sanitized"), f"CMAKE_CXX_FLAGS={SANITIZED}address,undefined")


@pytest.fixture(scope="module")
def aarch64(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which(CROSS_COMPILER) is None:
        missing(f"needs {CROSS_COMPILER} (Debian's g++-aarch64-linux-gnu)")
    return build(
        tmp_path_factory.mktemp("aarch64"),
        "CMAKE_SYSTEM_NAME=Linux",
        "CMAKE_SYSTEM_PROCESSOR=aarch64",
        f"CMAKE_CXX_COMPILER={CROSS_COMPILER}",
        "CMAKE_EXE_LINKER_FLAGS=-static",
    )


def test_random_cases_agree_and_stay_within_their_memory(sanitized: Path) -> None:
    assert run(sanitized, CASES).startswith(f"{CASES} cases agree, ")


def test_random_cases_have_no_data_races(tmp_path: Path) -> None:
    program = build(tmp_path, f"CMAKE_CXX_FLAGS={SANITIZED}thread")
    assert run(program, 1000).startswith("1000 cases agree, ")


def test_core_compiles_for_aarch64(aarch64: Path) -> None:
    machine = int.from_bytes(aarch64.read_bytes()[18:20], "little")
    assert machine == 183  # EM_AARCH64 in the ELF header


def test_aarch64_gives_the_bits_of_this_machine(aarch64: Path, sanitized: Path) -> None:
    qemu = shutil.which("qemu-aarch64")
    if qemu is None:
        missing("needs qemu-aarch64 (Debian's qemu-user)")
    assert run(qemu, aarch64, 1000) == run(sanitized, 1000)
