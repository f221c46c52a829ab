"""Adapters that cannot be served, and files that do not arrive whole: refused with what is wrong, nothing is kept."""

from __future__ import annotations

import hashlib
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
import torch
from safetensors.torch import load_file, save_file

from loraplex.client import Client
from loraplex.client.errors import InvalidRequestError, LoraplexClientError, NotFoundError, PreconditionError
from loraplex.v1 import adapter_pb2, adapter_pb2_grpc
from tests.adapter_factory import tensors, write_adapter
from tests.integration.serving import RunningServer, base_of_model, fitting_adapter

WEIGHTS = "adapter_model.safetensors"
A_KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def _no_config(folder: Path) -> None:
    fitting_adapter(folder)
    (folder / "adapter_config.json").unlink()


def _nan(folder: Path) -> None:
    fitting_adapter(folder)
    weights = load_file(folder / WEIGHTS)
    weights[A_KEY][0, 0] = math.nan
    save_file(weights, folder / WEIGHTS)


def _rank_mismatch(folder: Path) -> None:
    write_adapter(folder, weights=tensors(base_of_model(), rank=3), r=4)


def _pickled(folder: Path) -> None:
    fitting_adapter(folder)
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")


def _qalora(folder: Path) -> None:
    fitting_adapter(folder, use_qalora=True)


def _truncated(folder: Path) -> None:
    fitting_adapter(folder)
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: len(content) // 2])


def _not_json(folder: Path) -> None:
    fitting_adapter(folder)
    (folder / "adapter_config.json").write_text("{")


def _wrong_shapes(folder: Path) -> None:
    weights = tensors(base_of_model())
    weights[A_KEY] = torch.zeros(4, 31)
    write_adapter(folder, weights=weights)


def _weights_outside(folder: Path) -> None:
    fitting_adapter(folder)
    outside = folder.parent.parent / f"{folder.name}.safetensors"
    shutil.move(folder / WEIGHTS, outside)
    (folder / WEIGHTS).symlink_to(outside)


BROKEN: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "no-config": (_no_config, "adapter_config.json", "is missing"),
    "nan": (_nan, "q_proj.lora_A", "NaN"),
    "rank-mismatch": (_rank_mismatch, "q_proj.lora_A", "rank"),
    "pickled": (_pickled, WEIGHTS, "is a pickle"),
    "qalora": (_qalora, "use_qalora", "QALoRA"),
    "truncated": (_truncated, WEIGHTS, "damaged or incomplete"),
    "not-json": (_not_json, "adapter_config.json", "JSON"),
    "wrong-shapes": (_wrong_shapes, A_KEY, "has 31 inputs, the base's module has 32"),
    "weights-outside": (_weights_outside, WEIGHTS, "link that leads out"),
}


@pytest.fixture
def adapters(server: RunningServer) -> Iterator[Path]:
    """A folder below the server's adapter root."""
    folder = server.folders.adapters / "broken"
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize("case", BROKEN)
def test_broken_adapter_is_refused_with_what_is_wrong(client: Client, adapters: Path, case: str) -> None:
    make, subject, advice = BROKEN[case]
    make(adapters / case)
    with pytest.raises(PreconditionError) as raised:
        client.register_adapter(case, adapters / case)
    error = raised.value
    assert error.code is grpc.StatusCode.FAILED_PRECONDITION
    assert error.reason == "PRECONDITION"
    assert any(subject in v.field and advice in v.description for v in error.violations), error.violations
    assert advice in str(error)
    assert error.violation_count >= len(error.violations) > 0
    report = client.get_bind_report(error.report_id)
    assert len(report.problems) == error.violation_count
    with pytest.raises(NotFoundError):
        client.get_adapter(case)


def test_a_bad_new_version_leaves_the_old_one(client: Client, adapters: Path) -> None:
    before = client.get_adapter("alpha").digest
    _nan(adapters / "nan")
    with pytest.raises(PreconditionError):
        client.register_adapter("alpha", adapters / "nan")
    assert client.get_adapter("alpha").digest == before


def test_many_findings_are_cut_to_what_trailers_carry(client: Client, adapters: Path) -> None:
    weights = {
        f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_{side}.weight": torch.zeros(*shape)
        for layer in range(100)
        for side, shape in (("A", (4, 7)), ("B", (7, 4)))
    }
    write_adapter(adapters / "many", weights=weights, target_modules=["q_proj"])
    with pytest.raises(PreconditionError) as raised:
        client.register_adapter("many", adapters / "many")
    error = raised.value
    assert 0 < len(error.violations) <= 20
    assert error.violation_count == 200
    assert len(client.get_bind_report(error.report_id).problems) == 200


def test_unknown_report(client: Client) -> None:
    with pytest.raises(NotFoundError, match="there is no report"):
        client.get_bind_report("none")


def _outside(adapters: Path) -> Path:
    return fitting_adapter(adapters.parent.parent / "outside")


def _dotted(adapters: Path) -> Path:
    return adapters / ".." / ".." / _outside(adapters).name


def _linked(adapters: Path) -> Path:
    (adapters / "link").symlink_to(_outside(adapters))
    return adapters / "link"


@pytest.mark.parametrize("path_of", [_outside, _dotted, _linked], ids=["elsewhere", "dots", "symlink"])
def test_paths_outside_the_roots_are_refused(client: Client, adapters: Path, path_of: Callable[[Path], Path]) -> None:
    with pytest.raises(InvalidRequestError, match="not below the allowed adapter roots") as raised:
        client.register_adapter("outside", path_of(adapters))
    assert [violation.field for violation in raised.value.violations] == ["path"]


@pytest.mark.parametrize("path", ["", "\0", "x" * 5000], ids=["empty", "zero byte", "over-long"])
def test_paths_that_are_none(server: RunningServer, client: Client, path: str) -> None:
    with pytest.raises(InvalidRequestError) as raised:
        client.register_adapter("none", path and f"{server.folders.adapters}/{path}")
    assert [violation.field for violation in raised.value.violations] == ["path"]


@pytest.mark.parametrize("name", ["", "base", "../x", "a b", "ż", "n" * 200])
def test_names_that_are_not_allowed(client: Client, adapters: Path, name: str) -> None:
    fitting_adapter(adapters / "good")
    with pytest.raises(InvalidRequestError) as raised:
        client.register_adapter(name, adapters / "good")
    assert [violation.field for violation in raised.value.violations] == ["name"]


Requests = list[adapter_pb2.UploadAdapterRequest]


def _upload(folder: Path) -> Requests:
    """Return the messages of a good upload: the header, then a chunk for each file."""
    files = {path.name: path.read_bytes() for path in sorted(fitting_adapter(folder).iterdir())}
    header = adapter_pb2.UploadHeader(
        name="sent",
        files=[
            adapter_pb2.UploadFile(name=name, size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
            for name, data in files.items()
        ],
    )
    chunks = [adapter_pb2.UploadChunk(file=name, data=data) for name, data in files.items()]
    return [
        adapter_pb2.UploadAdapterRequest(header=header),
        *(adapter_pb2.UploadAdapterRequest(chunk=chunk) for chunk in chunks),
    ]


def _cut(messages: Requests) -> Requests:
    messages[-1].chunk.data = messages[-1].chunk.data[:-1]
    return messages


def _changed(messages: Requests) -> Requests:
    messages[-1].chunk.data = messages[-1].chunk.data[:-1] + b"?"
    return messages


def _renamed(messages: Requests) -> Requests:
    messages[0].header.files[0].name = "../escape.json"
    return messages


BAD_UPLOADS: dict[str, tuple[Callable[[Requests], Requests], str]] = {
    "truncated": (_cut, "ended after"),
    "wrong checksum": (_changed, "SHA-256"),
    "a file too few": (lambda messages: messages[:-1], "ended after 0 of"),
    "too long": (lambda messages: [*messages, messages[-1]], "longer than"),
    "no header": (lambda messages: messages[1:], "first message"),
    "two headers": (lambda messages: [messages[0], *messages], "only the first message"),
    "nothing": (lambda _: [], "first message"),
    "path as a name": (_renamed, "is not one of"),
}


@pytest.mark.parametrize("case", BAD_UPLOADS)
def test_bad_upload_leaves_nothing(server: RunningServer, adapters: Path, case: str) -> None:
    change, advice = BAD_UPLOADS[case]
    with grpc.insecure_channel(server.target) as channel:
        stub = adapter_pb2_grpc.AdapterServiceStub(channel)
        with pytest.raises(grpc.RpcError) as raised:
            stub.UploadAdapter(iter(change(_upload(adapters / "sent"))), timeout=20)
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert advice in (raised.value.details() or "")
    assert not list((server.folders.state / "incoming").iterdir())


def test_upload_that_breaks_off_leaves_nothing(server: RunningServer, client: Client, adapters: Path) -> None:
    folder = fitting_adapter(adapters / "sent")

    def stop(state: object) -> None:
        raise RuntimeError("the caller has had enough")

    with pytest.raises((RuntimeError, LoraplexClientError)):
        client.upload_adapter("sent", folder, progress=stop)
    with pytest.raises(NotFoundError):
        client.get_adapter("sent")


def test_upload_of_a_broken_adapter(client: Client, adapters: Path) -> None:
    _wrong_shapes(adapters / "sent")
    with pytest.raises(PreconditionError) as raised:
        client.upload_adapter("sent", adapters / "sent")
    assert client.get_bind_report(raised.value.report_id).problems
