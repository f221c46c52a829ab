"""`loraplex adapter`, against a scripted server."""

from __future__ import annotations

import json
import os
from pathlib import Path

import grpc
from google.rpc import error_details_pb2

from loraplex.v1 import adapter_pb2
from tests.unit.command import Run, ok
from tests.unit.fake_server import DIGEST, FakeServer, answer, error_info, fail


def test_a_refused_registration_lists_what_does_not_fit(run: Run, server: FakeServer) -> None:
    failure = error_details_pb2.PreconditionFailure()
    failure.violations.add(type="BIND", subject="x_proj", description="the base has no x_proj")
    info = error_info("BIND", report_id="rep-1", violation_count="24")
    server.script["RegisterAdapter"].append(fail(grpc.StatusCode.FAILED_PRECONDITION, "does not fit", failure, info))
    result = run("adapter", "register", "a", "/adapters/a")
    assert result.exit_code == 1
    assert result.stderr.splitlines() == [
        "error: does not fit",
        "  x_proj: the base has no x_proj",
        "  and 23 more; all of it: loraplex adapter report rep-1",
    ]


def test_adapter_register_and_upload(run: Run, server: FakeServer, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"x" * 100)
    assert ok(run("adapter", "register", "a", "there/a", "--description", "d")) == (
        f"registered a@2 ({DIGEST}, rank 8, before: sha256:old)\n"
    )
    ok(run("adapter", "register", "a", os.path.relpath(tmp_path)))
    said = ["--tag", "x", "--tag", "y", "--owner", "me", "--expected-digest", DIGEST]
    sampling = ["--sampling", "temperature=0.5", "--sampling", "stop=a", "--sampling", "stop=b=c"]
    ok(run("adapter", "register", "a", "hf://org/repo", *said, *sampling, "--sampling", "ignore_eos=true"))
    paths = [seen.request.path for seen in server.seen["RegisterAdapter"]]
    assert paths == ["there/a", str(tmp_path.resolve()), "hf://org/repo"]
    request = server.seen["RegisterAdapter"][-1].request
    assert (list(request.tags), request.owner, request.expected_digest) == (["x", "y"], "me", DIGEST)
    defaults = request.default_sampling
    assert (defaults.temperature, list(defaults.stop), defaults.ignore_eos) == (0.5, ["a", "b=c"], True)
    assert not server.seen["RegisterAdapter"][0].request.HasField("default_sampling")
    assert ok(run("adapter", "upload", "b", tmp_path)) == f"registered b@2 ({DIGEST}, rank 8)\n"
    document = json.loads(ok(run("adapter", "upload", "b", tmp_path, "--json")))
    assert document["adapter"]["created_at"] == "2023-11-14T22:13:20+00:00"
    ok(run("adapter", "upload", "b", tmp_path, *said, *sampling))
    header = server.seen["UploadAdapter"][-1].request[0].header
    assert (list(header.tags), header.owner, header.expected_digest) == (["x", "y"], "me", DIGEST)
    assert list(header.default_sampling.stop) == ["a", "b=c"]


def test_adapter_download(run: Run, tmp_path: Path) -> None:
    assert ok(run("adapter", "download", "a@2", tmp_path / "a")) == f"downloaded a@2 ({DIGEST}) to {tmp_path / 'a'}\n"
    assert (tmp_path / "a" / "adapter_config.json").read_text() == "{}"
    assert json.loads(ok(run("adapter", "download", "a", tmp_path / "b", "--json")))["folder"] == str(tmp_path / "b")


def test_adapter_list_and_show(run: Run, server: FakeServer) -> None:
    table = ok(run("adapter", "list", "--contains", "x", "--tag", "t", "--tag", "u", "--owner", "me"))
    request = server.seen["ListAdapters"][0].request
    assert (request.name_contains, list(request.tags), request.owner) == ("x", ["t", "u"], "me")
    for part in ("a-alias", "b-alias", "2KiB", "abababab", "stored"):
        assert part in table
    assert [entry["name"] for entry in json.loads(ok(run("adapter", "list", "--json")))] == ["a", "b"]
    server.script["ListAdapters"].append(answer(adapter_pb2.ListAdaptersResponse()))
    empty = run("adapter", "list")
    assert (ok(empty), empty.stderr) == ("", "no adapters\n")
    shown = ok(run("adapter", "show", "a"))
    parts = (DIGEST, "q_proj, v_proj", "2023-11-14 22:13:20+00:00", "temperature=0.7, stop=('END',)", "hf://org/repo")
    for part in (*parts, "x, y", "7 requests, 70 prompt and 700 new tokens, last 2023-11-14 22:15:00+00:00", "1KiB"):
        assert part in shown
    assert json.loads(ok(run("adapter", "show", "a", "--json")))["rank"] == 8


def test_adapter_changes(run: Run, server: FakeServer) -> None:
    gone = ok(run("adapter", "unregister", "a", "b@2", "--drain-timeout", 5))
    assert "1KiB of device memory, 2KiB of host memory and 4KiB of disk came free; 2 requests still run" in gone
    asked = [(seen.request.name, seen.request.drain_timeout_s) for seen in server.seen["UnregisterAdapter"]]
    assert asked == [("a", 5), ("b@2", 5)]
    assert json.loads(ok(run("adapter", "unregister", "a", "--json")))["a"]["disk_bytes_freed"] == 4096
    assert not server.seen["UnregisterAdapter"][-1].request.HasField("drain_timeout_s")
    assert ok(run("adapter", "pin", "a")) == f"pinned a ({DIGEST})\n"
    assert ok(run("adapter", "unpin", "a")) == f"unpinned a ({DIGEST})\n"
    assert ok(run("adapter", "alias", "prod", "a")) == "prod -> a (before: before)\n"
    assert ok(run("adapter", "alias", "prod", "--delete")) == "deleted the alias prod\n"
    canary = json.loads(ok(run("adapter", "alias", "prod", "a@1=9", "a=1", "--json")))
    assert canary["targets"] == [{"name": "a@1", "weight": 9}, {"name": "a", "weight": 1}]
    assert ok(run("adapter", "alias", "prod", "a@1=9", "a=1")) == "prod -> a@1 (90.0%), a (10.0%) (before: before)\n"
    assert ok(run("adapter", "rollback", "prod")) == "prod -> a@1 (90.0%), b (10.0%)\n"
    ok(run("adapter", "update", "a", "--description", "", "--no-tags"))
    ok(run("adapter", "update", "a", "--owner", "you", "--tag", "t", "--no-sampling"))
    first, second = (seen.request for seen in server.seen["UpdateAdapter"])
    assert [first.HasField(name) for name in ("description", "tags", "owner", "default_sampling")] == [1, 1, 0, 0]
    assert [second.HasField(name) for name in ("description", "tags", "owner", "default_sampling")] == [0, 1, 1, 1]
    assert (list(first.tags.values), list(second.tags.values), second.owner) == ([], ["t"], "you")
    assert json.loads(ok(run("adapter", "pin", "a", "--json")))["version"] == 2
    assert ok(run("adapter", "report", "rep-1")) == "x_proj: the base has no x_proj\n"
    assert len(json.loads(ok(run("adapter", "report", "rep-1", "--json")))["entries"]) == 2


def test_the_report_on_a_registered_adapter(run: Run, server: FakeServer) -> None:
    fits = adapter_pb2.BindEntry(subject="q.lora_A", module="layers.0.q", rank=8, scaling=2.0)
    row = adapter_pb2.BindEntry(subject="norm.weight", module="norm.weight")
    found = adapter_pb2.GetBindReportResponse(report_id=DIGEST, base_fingerprint="b", entries=[fits, row])
    server.script["GetBindReport"] += [fail(grpc.StatusCode.NOT_FOUND, "no report a"), answer(found)]
    lines = ok(run("adapter", "report", "a")).splitlines()
    assert lines == ["q.lora_A -> layers.0.q (rank 8, scaling 2)", "norm.weight -> norm.weight"]
    assert [seen.request.report_id for seen in server.seen["GetBindReport"]] == ["a", DIGEST]
