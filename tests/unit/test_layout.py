"""The repository keeps its shape: one namespace over five folders, short files, a wheel with code and nothing else."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SUB_PACKAGES = {
    "server": ["server"],
    "client": ["client", "cli"],
    "protos": ["v1"],
    "adapters": ["adapters"],
    "bench": ["bench"],
}
MAX_LINES = 400
LIGHT_MODULES = ["loraplex.client", "loraplex.cli.main"]
HEAVY_MODULES = ["bitsandbytes", "numba", "peft", "torch", "transformers", "trl"]


def python_files() -> list[Path]:
    folders = [*SUB_PACKAGES, "scripts", "tests"]
    return [path for folder in folders for path in (ROOT / folder).rglob("*.py") if "_pb2" not in path.name]


@pytest.mark.parametrize("folder", SUB_PACKAGES)
def test_namespace_folders_have_no_init(folder: str) -> None:
    # One __init__.py here would hide the other four folders from every import.
    assert not (ROOT / folder / "__init__.py").exists()
    assert not (ROOT / folder / "loraplex" / "__init__.py").exists()


@pytest.mark.parametrize("folder", SUB_PACKAGES)
def test_each_folder_holds_its_sub_packages(folder: str) -> None:
    found = {path.parent.name for path in (ROOT / folder / "loraplex").glob("*/__init__.py")}
    assert found == set(SUB_PACKAGES[folder])


def test_every_folder_with_code_is_a_package() -> None:
    folders = {path.parent for folder in SUB_PACKAGES for path in (ROOT / folder / "loraplex").rglob("*.py")}
    assert [folder for folder in sorted(folders) if not (folder / "__init__.py").exists()] == []


def test_files_are_short() -> None:
    long = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in python_files()}
    assert {path: lines for path, lines in long.items() if lines > MAX_LINES} == {}


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    pytest.importorskip("hatchling")
    output = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(output)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    (wheel,) = output.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def test_wheel_has_all_code(wheel_names: list[str]) -> None:
    code = [path for folder in SUB_PACKAGES for path in (ROOT / folder / "loraplex").rglob("*.py")]
    expected = {path.relative_to(ROOT).as_posix().split("/", 1)[1] for path in code}
    assert expected <= set(wheel_names)
    assert {"loraplex/v1/generation.proto", "loraplex/v1/generation_pb2.pyi"} <= set(wheel_names)


def test_wheel_has_nothing_else(wheel_names: list[str]) -> None:
    packages = {name for names in SUB_PACKAGES.values() for name in names}
    allowed = {f"loraplex/{name}" for name in packages}
    roots = {"/".join(name.split("/")[:2]) for name in wheel_names if ".dist-info/" not in name}
    assert roots == allowed
    assert [name for name in wheel_names if name.endswith((".safetensors", ".gguf")) or "example" in name] == []


@pytest.mark.parametrize("module", LIGHT_MODULES)
def test_client_and_command_import_nothing_heavy(module: str) -> None:
    # import-linter cannot see this for the command, which crosses all layers, though only inside functions.
    script = f"import sys, {module}; print(*(name for name in {HEAVY_MODULES} if name in sys.modules))"
    result = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True, timeout=60)
    assert result.stdout.split() == []
