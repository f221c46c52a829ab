"""The registry over gRPC, on a server of its own: names, versions, aliases, pins, and requests in flight meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from loraplex.client import AliasTarget, Client
from loraplex.client.errors import AlreadyExistsError, InvalidRequestError, NotFoundError, PreconditionError
from tests.integration.serving import Folders, RunningServer, eventually, fitting_adapter, greedy_ids


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
