"""Adapters' chat templates in a real server: what they write, and whom the rendering may hold up."""

from __future__ import annotations

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from loraplex.client import Client
from loraplex.client.errors import InvalidRequestError
from loraplex.server import template_queue, template_renderer
from tests.integration.serving import Folders, RunningServer, fitting_adapter

CHAT = [{"role": "user", "content": "The quick brown"}]
ENDLESS = "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}"


def register(server: RunningServer, client: Client, name: str, template: str | None = None) -> None:
    client.register_adapter(name, fitting_adapter(server.folders.adapters / name, seed=len(name), template=template))


def chat(client: Client, adapter: str) -> tuple[int, ...]:
    return client.generate(CHAT, adapter, max_tokens=4, ignore_eos=True).choices[0].token_ids


def test_an_adapters_template_writes_its_chats(server: RunningServer, client: Client) -> None:
    register(server, client, "brief", "{{ bos_token }}{{ messages[-1].content }}")
    register(server, client, "endless", ENDLESS)
    answer = client.generate("The quick brown", "brief", max_tokens=4, ignore_eos=True)
    assert chat(client, "brief") == answer.choices[0].token_ids
    with pytest.raises(InvalidRequestError, match="was stopped"):
        chat(client, "endless")
    for name in ("brief", "endless"):
        client.unregister_adapter(name)


def test_only_chats_with_adapters_templates_wait_for_them(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_renderer, "ANSWER_S", 3600.0)
    monkeypatch.setattr(template_queue, "WAIT_S", 3600.0)
    with RunningServer(folders) as server, server.client() as client, ThreadPoolExecutor(16) as pool:
        register(server, client, "brief", "{{ messages[-1].content }}")
        register(server, client, "plain")
        others = helpers()
        expected = chat(client, "brief")
        [helper] = helpers() - others
        os.kill(helper, signal.SIGSTOP)
        waiting = [pool.submit(chat, client, "brief") for _ in range(16)]
        for adapter in ("", "plain"):
            assert chat(client, adapter)
        assert client.generate("The quick brown", "brief", max_tokens=1)
        assert not any(call.done() for call in waiting)
        os.kill(helper, signal.SIGCONT)
        assert [call.result(60) for call in waiting] == [expected] * 16
        # And the end of the server does not wait for it either.
        os.kill(helper, signal.SIGSTOP)
        late = pool.submit(chat, client, "brief")
        server.stop()
        assert late.exception(60) is not None


def helpers() -> set[int]:
    """Return the process ids of this process's template processes; other tests' servers have theirs."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command, status = (folder / "cmdline").read_text(), (folder / "status").read_text()
        except OSError:  # it has just ended
            continue
        if "template_process" in command and f"\nPPid:\t{os.getpid()}\n" in status:
            found.add(int(folder.name))
    return found
