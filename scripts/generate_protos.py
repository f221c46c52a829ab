"""Generate the Python code of protos/, or check that the committed code is what the pinned generators make.

Usage: generate_protos.py [--check]. Without --check the files below protos/ are replaced; with it nothing is written
and the exit status is 1 if a generated file is missing, stale or left over.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from importlib.resources import files
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent / "protos"
GENERATED = ("*_pb2.py", "*_pb2.pyi", "*_pb2_grpc.py", "*_pb2_grpc.pyi")


def generate(output: Path) -> None:
    """Write the message and service code of every .proto below protos/, with stubs, below `output`.

    Raises:
        SystemExit: protoc found a mistake (it has said which on stderr).
    """
    # protoc looks for the stub generators on PATH. They lie beside this interpreter, whose environment may be inactive.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    outputs = [f"--{kind}_out={output}" for kind in ("python", "grpc_python")]
    outputs += [f"--{kind}_out=quiet:{output}" for kind in ("mypy", "mypy_grpc")]
    sources = sorted(str(path.relative_to(ROOT)) for path in ROOT.rglob("*.proto"))
    includes = [f"-I{ROOT}", f"-I{files('grpc_tools') / '_proto'}"]
    status = protoc.main(["protoc", *includes, *outputs, *sources])
    if status != 0:
        raise SystemExit(status)


def generated_files(folder: Path) -> dict[Path, bytes]:
    """Return the generated files below `folder`, by relative path."""
    paths = (path for pattern in GENERATED for path in folder.rglob(pattern))
    return {path.relative_to(folder): path.read_bytes() for path in paths}


def differences(expected: dict[Path, bytes], actual: dict[Path, bytes]) -> list[str]:
    """Return one line for each file that is missing, left over or different."""
    lines = [f"missing: protos/{path}" for path in sorted(expected.keys() - actual.keys())]
    lines += [f"left over: protos/{path}" for path in sorted(actual.keys() - expected.keys())]
    lines += [f"stale: protos/{path}" for path in sorted(expected.keys() & actual) if expected[path] != actual[path]]
    return lines


def main() -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        generate(Path(temporary))
        expected = generated_files(Path(temporary))
    actual = generated_files(ROOT)
    if arguments.check:
        lines = differences(expected, actual)
        print("\n".join([*lines, "run `make proto` and commit the result"] if lines else ["protos are up to date"]))
        return 1 if lines else 0
    for path in actual.keys() - expected.keys():
        (ROOT / path).unlink()
    for path, content in expected.items():
        (ROOT / path).write_bytes(content)
    print(f"wrote {len(expected)} files below protos/")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
