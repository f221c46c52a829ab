"""What the server answers, as frozen dataclasses. Knows nothing about gRPC."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from loraplex.client.options import SamplingOptions


class FinishReason(enum.StrEnum):
    """Why a choice ended: at a stop token or string, or at max_tokens or the context length."""

    STOP = "stop"
    LENGTH = "length"


class HealthStatus(enum.StrEnum):
    """Whether a service takes requests, as `grpc.health.v1` tells it."""

    UNKNOWN = "unknown"
    SERVING = "serving"
    NOT_SERVING = "not_serving"


@dataclass(frozen=True)
class TokenLogprob:
    """A token and its natural log probability, before temperature and filters."""

    token_id: int
    logprob: float


@dataclass(frozen=True)
class TokenLogprobs:
    """Log probabilities at one output position; `top` holds the most likely tokens, best first."""

    chosen: TokenLogprob
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Choice:
    """One output, or in a stream what is new in it; `finish_reason` is None while it goes on."""

    index: int
    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None


@dataclass(frozen=True)
class Usage:
    """Token counts; `completion_tokens` is over all choices, `cached_tokens` is the reused part of the prompt."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


@dataclass(frozen=True)
class Generation:
    """A finished generation; `adapter_digest` names the adapter version that was applied, empty for the base."""

    request_id: str
    choices: tuple[Choice, ...]
    usage: Usage
    adapter_digest: str = ""

    @property
    def text(self) -> str:
        """The first choice's text."""
        return self.choices[0].text if self.choices else ""


@dataclass(frozen=True)
class GenerationPiece:
    """One message of a stream: what is new in one or more choices; only the last message has `usage`."""

    request_id: str
    choices: tuple[Choice, ...]
    usage: Usage | None = None
    adapter_digest: str = ""

    @property
    def text(self) -> str:
        """What is new in the first choice (index 0)."""
        return "".join(choice.text for choice in self.choices if choice.index == 0)


@dataclass(frozen=True)
class AdapterVersion:
    """One content that a name has had; `source` is the folder or URL it came from, or "upload"."""

    number: int
    digest: str
    created_at: datetime
    size_bytes: int
    source: str


@dataclass(frozen=True)
class Adapter:
    """A registered adapter, in one version.

    Attributes:
        rank: the largest of any module.
        target_modules: without layer numbers.
        size_bytes: of the stored weights.
        resident: on the device now.
        active_requests: in flight on this version.
        aliases: those that point at any version of the name.
        version: its number; `name@2` selects the second.
        default_sampling: what a request that leaves a field unset gets.
        source: the folder or URL it came from, or "upload".
        kind: "lora", "dora" or "alora".
        last_used_at, request_count, prompt_tokens, generation_tokens: of the name, since it was registered.
        device_bytes, host_bytes: what it takes of the memory budgets now.
        problem: empty, or why it cannot serve requests although it is registered.
        versions: all versions of the name, the latest first; only `get_adapter` fills it.
    """

    name: str
    digest: str
    description: str
    rank: int
    target_modules: tuple[str, ...]
    size_bytes: int
    created_at: datetime
    resident: bool
    pinned: bool
    active_requests: int
    aliases: tuple[str, ...]
    version: int
    tags: tuple[str, ...]
    owner: str
    default_sampling: SamplingOptions
    source: str
    kind: str
    has_chat_template: bool
    last_used_at: datetime | None
    request_count: int
    prompt_tokens: int
    generation_tokens: int
    device_bytes: int
    host_bytes: int
    problem: str
    versions: tuple[AdapterVersion, ...] = ()


@dataclass(frozen=True)
class Registration:
    """A new version of a name; `previous_digest` is what the name pointed at before, empty if nothing."""

    adapter: Adapter
    previous_digest: str


@dataclass(frozen=True)
class AliasTarget:
    """What an alias points at: a name, or one with a version, and its share of the requests."""

    name: str
    weight: float = 1.0


@dataclass(frozen=True)
class DownloadedAdapter:
    """A version as it was stored, in a new folder on this machine."""

    digest: str
    folder: Path


@dataclass(frozen=True)
class Unregistration:
    """A name or a version taken away.

    Attributes:
        digest: the version it meant.
        active_requests: that still finish on it; what they hold comes free with them.
        device_bytes_freed, host_bytes_freed, disk_bytes_freed: what has come free of budgets and disk.
    """

    digest: str
    active_requests: int
    device_bytes_freed: int = 0
    host_bytes_freed: int = 0
    disk_bytes_freed: int = 0


@dataclass(frozen=True)
class BindEntry:
    """One tensor or target module of an adapter; `problem` is empty where it fits the base model."""

    subject: str
    module: str
    rank: int
    scaling: float
    problem: str


@dataclass(frozen=True)
class BindReport:
    """How an adapter fits the base model, tensor by tensor."""

    report_id: str
    base_fingerprint: str
    entries: tuple[BindEntry, ...]

    @property
    def problems(self) -> tuple[BindEntry, ...]:
        """The entries that do not fit."""
        return tuple(entry for entry in self.entries if entry.problem)


@dataclass(frozen=True)
class ServerInfo:
    """What a server is and what it can take; the fields are those of `loraplex.v1.GetServerInfoResponse`."""

    version: str
    model: str
    architecture: str
    base_fingerprint: str
    quantization: str
    dtype: str
    device: str
    max_model_len: int
    max_num_seqs: int
    kv_blocks: int
    kv_block_size: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    target_modules: tuple[str, ...]
    adapter_device_memory_bytes: int
    export_root: str
    model_path: str
