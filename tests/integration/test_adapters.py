"""The registry over gRPC, on a server of its own: names, versions, aliases, pins, and requests in flight meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from loraplex.client import AliasTarget, Client, SamplingOptions
from loraplex.client.errors import AlreadyExistsError, InvalidRequestError, NotFoundError, PreconditionError
from tests.integration.serving import CONTEXT, LONG, Folders, RunningServer, eventually, fitting_adapter, greedy_ids


@pytest.fixture(scope="module")
def own(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    root = tmp_path_factory.mktemp("own")
    for name in ("adapters", "export"):
        (root / name).mkdir()
    with RunningServer(Folders(model_folder, root / "adapters", root / "state", root / "export")) as running:
        yield running


@pytest.fixture
def client(own: RunningServer) -> Iterator[Client]:
    """A client of a server that has no adapters; it has none afterwards either, on disk or on the device."""
    with own.client() as client:
        yield client
        for adapter in client.list_adapters():
            for alias in adapter.aliases:
                client.delete_alias(alias)
            client.unregister_adapter(adapter.name)
    eventually(lambda: own.is_idle, "nothing runs")
    eventually(lambda: own.metric('adapters{tier="device"}') == 0, "no weights are on the device")
    eventually(lambda: not list((own.folders.state / "store").rglob("*.safetensors")), "no weights are stored")


def _make(own: RunningServer, seed: int) -> Path:
    folder = own.folders.adapters / f"seed{seed}"
    return folder if folder.exists() else fitting_adapter(folder, seed=seed)


def test_register_list_show_update(own: RunningServer, client: Client) -> None:
    for number in range(5):
        registered = client.register_adapter(f"team/a{number}", _make(own, number), f"number {number}")
        assert registered.previous_digest == ""
        assert registered.adapter.description == f"number {number}"
    listed = client.list_adapters(page_size=2)
    assert [adapter.name for adapter in listed] == [f"team/a{number}" for number in range(5)]
    assert [adapter.name for adapter in client.list_adapters("a3")] == ["team/a3"]
    with pytest.raises(InvalidRequestError):
        client.list_adapters(page_size=-1)
    shown = client.get_adapter("team/a1")
    assert (shown.rank, shown.target_modules) == (4, ("q_proj", "v_proj"))
    assert shown.size_bytes > 0
    report = client.get_bind_report(shown.digest)
    assert not report.problems
    assert {(entry.rank, entry.scaling) for entry in report.entries} == {(4, 2.0)}
    assert client.update_adapter("team/a1", description="new").description == "new"
    assert client.update_adapter("team/a1").description == "new"
    assert client.get_adapter(f"team/a1@{shown.digest}").digest == shown.digest
    assert own.metric('adapters{tier="disk"}') == 5


def test_upload_is_like_a_folder(own: RunningServer, client: Client, tmp_path: Path) -> None:
    by_path = client.register_adapter("by-path", _make(own, 1)).adapter
    seen: list[int] = []
    uploaded = client.upload_adapter("sent", _make(own, 1), progress=lambda state: seen.append(state.bytes_sent))
    assert uploaded.adapter.digest == by_path.digest
    assert seen[-1] >= uploaded.adapter.size_bytes
    assert greedy_ids(client, "sent") == greedy_ids(client, "by-path") != greedy_ids(client)


def test_a_download_is_what_was_sent(own: RunningServer, client: Client, tmp_path: Path) -> None:
    folder = fitting_adapter(tmp_path / "template", seed=5, template="{{ messages }}")
    digest = client.upload_adapter("sent", folder).adapter.digest
    downloaded = client.download_adapter(f"sent@{digest[:15]}", tmp_path / "back")
    assert downloaded.digest == digest
    sent, back = ({path.name: path.read_bytes() for path in f.iterdir()} for f in (folder, downloaded.folder))
    assert back == sent
    assert client.upload_adapter("again", downloaded.folder).adapter.digest == digest
    with pytest.raises(NotFoundError):
        client.download_adapter("nothing", tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_aliases_move_at_once(own: RunningServer, client: Client) -> None:
    for name, seed in (("one", 1), ("two", 2)):
        client.register_adapter(name, _make(own, seed))
    assert client.set_alias("prod", "one") == ()
    assert greedy_ids(client, "prod") == greedy_ids(client, "one")
    assert client.set_alias("prod", "two") == (AliasTarget("one"),)
    assert greedy_ids(client, "prod") == greedy_ids(client, "two")
    with pytest.raises(PreconditionError, match="prod"):
        client.unregister_adapter("two")
    with pytest.raises(AlreadyExistsError):
        client.register_adapter("prod", _make(own, 3))
    assert client.rollback_alias("prod") == (AliasTarget("one"),)
    assert greedy_ids(client, "prod") == greedy_ids(client, "one")
    client.delete_alias("prod")
    with pytest.raises(NotFoundError):
        client.generate("x", "prod")


def test_a_weighted_alias_keeps_to_its_keys(own: RunningServer, client: Client) -> None:
    digests = [client.register_adapter("one", _make(own, seed)).adapter.digest for seed in (1, 2)]
    versions = [adapter.number for adapter in client.get_adapter("one").versions]
    assert versions == sorted(versions, reverse=True)
    client.set_alias("canary", {f"one@{versions[1]}": 1, "one": 1})

    def answered(key: str) -> str:
        return client.generate("x", "canary", routing_key=key, max_tokens=1).adapter_digest

    chosen = {key: answered(key) for key in map(str, range(24))}
    assert set(chosen.values()) == set(digests)
    assert {key: answered(key) for key in chosen} == chosen


def test_one_version_goes_and_its_name_stays(own: RunningServer, client: Client) -> None:
    old, new = (client.register_adapter("one", _make(own, seed)).adapter for seed in (1, 2))
    gone = client.unregister_adapter(f"one@{old.version}")
    assert (gone.digest, gone.active_requests, gone.disk_bytes_freed) == (old.digest, 0, old.size_bytes)
    assert [version.digest for version in client.get_adapter("one").versions] == [new.digest]
    with pytest.raises(NotFoundError, match="has no version"):
        client.generate("x", f"one@{old.version}")


def test_metadata_and_sampling_defaults(own: RunningServer, client: Client) -> None:
    defaults = SamplingOptions(max_tokens=3, ignore_eos=True, stop=("never",), temperature=0.0)
    adapter = client.register_adapter(
        "one", _make(own, 1), "text", tags=["b", "a"], owner="me", default_sampling=defaults
    ).adapter
    assert (adapter.tags, adapter.owner, adapter.default_sampling) == (("a", "b"), "me", defaults)
    assert adapter.source == str(_make(own, 1))
    assert len(client.generate("x", "one").choices[0].token_ids) == 3
    assert len(client.generate("x", "one", max_tokens=5).choices[0].token_ids) == 5
    assert len(client.generate("x", max_tokens=4, ignore_eos=True).choices[0].token_ids) == 4
    # What nobody asked for gives way where the context ends.
    client.update_adapter("one", default_sampling=SamplingOptions(max_tokens=CONTEXT, ignore_eos=True))
    assert len(client.generate([7] * (CONTEXT - 3), "one").choices[0].token_ids) == 3
    with pytest.raises(InvalidRequestError, match=r"default_sampling\.top_p"):
        client.update_adapter("one", default_sampling=SamplingOptions(top_p=2.0))
    assert client.update_adapter("one", tags=[], owner="you").description == "text"
    assert [a.name for a in client.list_adapters(owner="you")] == ["one"]
    assert client.list_adapters(tags=["a"]) == []


def test_usage_is_counted(own: RunningServer, client: Client) -> None:
    client.register_adapter("one", _make(own, 1))
    client.set_alias("alias", "one")
    assert client.get_adapter("one").last_used_at is None
    client.generate([5, 6, 7], "alias", max_tokens=4, ignore_eos=True, n=2)
    with client.stream([5, 6], "one", max_tokens=LONG, ignore_eos=True) as stream:
        next(stream)
    eventually(lambda: client.get_adapter("one").request_count == 2, "both requests are counted")
    used = client.get_adapter("one")
    assert used.prompt_tokens == 5
    assert 8 < used.generation_tokens < 8 + LONG, "the second was broken off"
    assert used.last_used_at is not None


def test_a_wrong_digest_is_refused(own: RunningServer, client: Client) -> None:
    right = client.upload_adapter("one", _make(own, 1)).adapter.digest
    for call in (client.upload_adapter, client.register_adapter):
        with pytest.raises(PreconditionError, match="not the expected"):
            call("one", _make(own, 2), expected_digest=right)
        assert call("one", _make(own, 1), expected_digest=right).adapter.digest == right


def test_unregistering_waits_for_requests_if_asked_to(own: RunningServer, client: Client) -> None:
    adapter = client.register_adapter("one", _make(own, 1)).adapter
    stream = client.stream("x", "one", max_tokens=LONG, ignore_eos=True)
    next(stream)
    gone = client.unregister_adapter("one", drain_timeout_s=0)
    assert (gone.active_requests, gone.disk_bytes_freed) == (1, 0)
    again = client.register_adapter("one", _make(own, 1)).adapter
    assert (again.digest, again.active_requests) == (adapter.digest, 1)
    with ThreadPoolExecutor(1) as threads:
        draining = threads.submit(client.unregister_adapter, "one", drain_timeout_s=60)
        eventually(lambda: not client.list_adapters(), "the name has gone at once")
        stream.close()
        left = draining.result(30)
    assert (left.active_requests, left.disk_bytes_freed) == (0, adapter.size_bytes)
    with pytest.raises(InvalidRequestError, match="drain_timeout_s"):
        client.unregister_adapter("one", drain_timeout_s=-1)


def test_the_reply_says_what_came_free(own: RunningServer, client: Client) -> None:
    client.register_adapter("one", _make(own, 1))
    client.generate("x", "one", max_tokens=1)
    held = client.get_adapter("one")
    assert held.resident
    assert held.device_bytes > 0
    gone = client.unregister_adapter("one")
    assert (gone.device_bytes_freed, gone.host_bytes_freed) == (held.device_bytes, held.host_bytes)
    assert gone.disk_bytes_freed == held.size_bytes
    client.register_adapter("one", _make(own, 1))
    assert client.unregister_adapter("one").device_bytes_freed == 0, "nothing was loaded"


def test_the_series_of_a_name_go_with_its_last_request(own: RunningServer, client: Client) -> None:
    client.register_adapter("gone", _make(own, 1))
    stream = client.stream("x", "gone", max_tokens=LONG, ignore_eos=True)
    next(stream)
    series = 'generation_tokens_total{adapter="gone"}'
    eventually(lambda: own.metric(series) > 0, "its tokens are counted")
    client.unregister_adapter("gone", drain_timeout_s=0)
    stream.close()
    eventually(lambda: own.metric(series) == 0, "the series has gone")


def test_pin_and_unpin(own: RunningServer, client: Client) -> None:
    client.register_adapter("one", _make(own, 1))
    assert not client.get_adapter("one").resident
    assert client.pin_adapter("one").pinned
    eventually(lambda: client.get_adapter("one").resident, "the pinned adapter is on the device")
    assert not client.unpin_adapter("one").pinned
    with pytest.raises(NotFoundError):
        client.pin_adapter("none")


def test_one_of_two_names_of_a_version_goes(own: RunningServer, client: Client) -> None:
    for name in ("one", "same"):
        digest = client.register_adapter(name, _make(own, 1)).adapter.digest
    client.pin_adapter("one")
    eventually(lambda: client.get_adapter("same").resident, "the pinned adapter is on the device")
    assert client.unregister_adapter("one").digest == digest
    left = client.get_adapter("same")
    assert not left.pinned, "the pin was on the other name"
    assert left.resident
    assert greedy_ids(client, "same") != greedy_ids(client)


def test_older_versions_leave_the_device_with_their_name(own: RunningServer, client: Client) -> None:
    first = client.register_adapter("one", _make(own, 1)).adapter.digest
    client.pin_adapter("one")
    old = greedy_ids(client, "one")
    second = client.register_adapter("one", _make(own, 2))
    assert second.previous_digest == first
    assert greedy_ids(client, "one") != old == greedy_ids(client, f"one@{first}")
    assert own.metric('adapters{tier="device"}') == 2
    client.unregister_adapter("one")
    eventually(lambda: own.metric('adapters{tier="device"}') == 0, "both versions leave the device")


def test_requests_in_flight_finish_on_what_they_started_with(own: RunningServer, client: Client) -> None:
    old = client.register_adapter("one", _make(own, 1)).adapter.digest
    alone = client.generate("x", "one", max_tokens=300, ignore_eos=True).choices[0].token_ids
    stream = client.stream("x", "one", max_tokens=300, ignore_eos=True)
    next(stream)
    new = client.register_adapter("one", _make(own, 2)).adapter.digest
    assert client.generate("x", "one", max_tokens=1).adapter_digest == new != old
    client.unregister_adapter("one")
    with pytest.raises(NotFoundError):
        client.generate("x", "one")
    answer = stream.collect()
    assert answer.adapter_digest == old
    assert answer.choices[0].token_ids == alone
    eventually(lambda: own.metric('adapters{tier="host"}') == 0, "no tier keeps what has no name")
    assert own.metric('adapters{tier="device"}') == 0
