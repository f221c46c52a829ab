"""A merge in a process of its own: what it says, and that however it ends, the target is whole or absent."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from loraplex.adapters.disk import parents_made, partial_folder
from loraplex.adapters.merge import MergeOptions
from loraplex.adapters.merge_job import MergeJob, MergeReport
from loraplex.adapters.merge_methods import MergeMethod, Mixing
from loraplex.adapters.merge_plan import MergeBase
from tests.parity.merge_models import LLAMA_TARGETS, make_adapter, make_base


def job(tmp_path: Path, **options: Any) -> MergeJob:
    base = tmp_path / "base"
    if not base.exists():
        make_base(base, "llama")
        make_adapter(base, tmp_path / "adapter", LLAMA_TARGETS)
    return MergeJob(base, ((tmp_path / "adapter", 1.0),), tmp_path / "out" / "merged", MergeOptions(**options), 1)


@contextmanager
def started(job: MergeJob) -> Iterator[subprocess.Popen[str]]:
    job.output.parent.mkdir(exist_ok=True)
    with subprocess.Popen(
        [sys.executable, "-P", "-m", "loraplex.adapters.merge_process"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        try:
            assert process.stdin is not None
            json.dump(job.to_json(), process.stdin)
            process.stdin.close()
            yield process
        finally:
            process.kill()


def events(process: subprocess.Popen[str]) -> Iterator[dict[str, Any]]:
    assert process.stdout is not None
    return (json.loads(line) for line in process.stdout)


def test_jobs_survive_json() -> None:
    mixing = Mixing(MergeMethod.DARE_TIES, 0.25, 2**64 - 1)
    options = MergeOptions(
        MergeBase.DEQUANTIZED, "nf4", None, mixing, "nf4", 1 << 20, 0.5, ("one", "two"), ("program", "argument")
    )
    whole = MergeJob(Path("m"), ((Path("a"), 0.5), (Path("b"), -1.0)), Path("o"), options, 3)
    assert MergeJob.from_json(json.loads(json.dumps(whole.to_json()))) == whole


def test_phases_report_and_error(tmp_path: Path) -> None:
    with started(job(tmp_path)) as process:
        told = list(events(process))
        assert process.wait() == 0
    phases = [event["phase"] for event in told[:-1]]
    assert list(dict.fromkeys(phases)) == ["merging", "checking"]
    assert phases == sorted(phases, reverse=True)
    for phase in ("merging", "checking"):
        counts = [(event["done"], event["total"]) for event in told if event.get("phase") == phase]
        assert counts[-1][0] == counts[-1][1] == len(counts)
    report = MergeReport.from_json(told[-1]["report"])
    assert report.comparison.mean_kl < 1e-9
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["merged"]
    with started(job(tmp_path)) as process:
        (told_again,) = events(process)
        assert (process.wait(), told_again["error"]) == (1, "AlreadyExistsError")


@pytest.mark.parametrize(("phase", "terminated"), [("merging", False), ("checking", True)])
def test_sigterm_and_a_reader_that_goes_leave_nothing(tmp_path: Path, phase: str, terminated: bool) -> None:
    with started(job(tmp_path)) as process:
        for event in events(process):
            if event.get("phase") == phase:
                break
        if terminated:
            process.send_signal(signal.SIGTERM)
        assert process.stdout is not None
        process.stdout.close()
        assert process.wait() != 0
    assert not list((tmp_path / "out").iterdir())


def test_what_a_killed_merge_leaves_the_next_one_removes(tmp_path: Path) -> None:
    with started(job(tmp_path)) as process:
        next(events(process))
        process.send_signal(signal.SIGSTOP)
        (left,) = (tmp_path / "out").iterdir()
        assert left.name.startswith(".merged.")
        # It lives: whoever merges beside it must leave its folder alone.
        with partial_folder(tmp_path / "out" / "other") as own:
            assert left.is_dir()
            assert own.is_dir()
        process.kill()
        process.wait()
    assert [path.name for path in (tmp_path / "out").iterdir()] == [left.name]
    with started(job(tmp_path)) as process:
        list(events(process))
        assert process.wait() == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["merged"]


def test_only_what_a_merge_left_is_removed(tmp_path: Path) -> None:
    hexadecimal = "0" * 32
    kept = [".mine.partial", f"merged.{hexadecimal}.partial", f".file.{hexadecimal}.partial"]
    (tmp_path / kept[0]).mkdir()
    (tmp_path / kept[1]).mkdir()
    (tmp_path / kept[2]).write_text("a file")
    outside = tmp_path / "outside"
    (outside / "precious").mkdir(parents=True)
    link = tmp_path / f".link.{hexadecimal}.partial"
    link.symlink_to(outside)
    with partial_folder(tmp_path / "merged"):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*kept, "outside", link.name])
    assert (outside / "precious").is_dir()


def test_folders_made_for_a_refused_output_go_again(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    target = tmp_path / "kept" / "new" / "newer" / "merged"

    def fail(beside: str = "") -> None:
        with parents_made(target):
            assert target.parent.is_dir()
            if beside:
                (tmp_path / "kept" / "new" / beside).touch()
            raise InterruptedError

    with pytest.raises(InterruptedError):
        fail()
    assert not list((tmp_path / "kept").iterdir())
    with pytest.raises(InterruptedError):
        fail(beside="another's")
    assert [path.name for path in (tmp_path / "kept" / "new").iterdir()] == ["another's"]
    with parents_made(target):
        target.mkdir()
    assert target.is_dir()


@pytest.mark.slow
def test_killed_at_any_moment_the_target_is_whole_or_absent(tmp_path: Path) -> None:
    first = job(tmp_path)
    with started(first) as process:
        begun = time.monotonic()
        next(events(process))
        importing = time.monotonic() - begun
        list(events(process))
        whole = time.monotonic() - begun
    names = sorted(path.name for path in first.output.iterdir())
    for moment in range(4):
        target = MergeJob(first.model_dir, first.adapters, tmp_path / "out" / f"m{moment}", first.options, 1)
        with started(target) as process:
            time.sleep(importing + (whole - importing) * moment / 3)
            process.kill()
            process.wait()
        if target.output.exists():
            assert sorted(path.name for path in target.output.iterdir()) == names
    with partial_folder(tmp_path / "out" / "last"):
        pass
    assert not [path for path in os.listdir(tmp_path / "out") if path.startswith(".")]
