"""The client of a Loraplex server: `Client` and, with the same methods, `AsyncClient`."""

from loraplex.client.async_client import AsyncClient
from loraplex.client.async_streams import AsyncGenerationStream, AsyncMergeStream
from loraplex.client.channel import DEFAULT_TARGET, ChannelOptions
from loraplex.client.client import Client
from loraplex.client.downloads import DownloadProgress
from loraplex.client.errors import (
    AlreadyExistsError,
    CancelledError,
    DeadlineError,
    ErrorDetails,
    FieldViolation,
    InternalError,
    InvalidRequestError,
    LoraplexClientError,
    NotFoundError,
    PreconditionError,
    ResourceExhaustedError,
    UnavailableError,
)
from loraplex.client.merging import MergeBase, MergeComparison, MergeMethod, MergeProgress, SpeedFigures
from loraplex.client.options import ChatMessage, Prompt, SamplingOptions
from loraplex.client.results import (
    Adapter,
    AdapterVersion,
    AliasTarget,
    BindEntry,
    BindReport,
    Choice,
    DownloadedAdapter,
    FinishReason,
    Generation,
    GenerationPiece,
    HealthStatus,
    Registration,
    ServerInfo,
    TokenLogprob,
    TokenLogprobs,
    Unregistration,
    Usage,
)
from loraplex.client.retry import NO_RETRY, RetryPolicy
from loraplex.client.streams import GenerationStream, MergeStream
from loraplex.client.uploads import UploadProgress

__all__ = [
    "DEFAULT_TARGET",
    "NO_RETRY",
    "Adapter",
    "AdapterVersion",
    "AliasTarget",
    "AlreadyExistsError",
    "AsyncClient",
    "AsyncGenerationStream",
    "AsyncMergeStream",
    "BindEntry",
    "BindReport",
    "CancelledError",
    "ChannelOptions",
    "ChatMessage",
    "Choice",
    "Client",
    "DeadlineError",
    "DownloadProgress",
    "DownloadedAdapter",
    "ErrorDetails",
    "FieldViolation",
    "FinishReason",
    "Generation",
    "GenerationPiece",
    "GenerationStream",
    "HealthStatus",
    "InternalError",
    "InvalidRequestError",
    "LoraplexClientError",
    "MergeBase",
    "MergeComparison",
    "MergeMethod",
    "MergeProgress",
    "MergeStream",
    "NotFoundError",
    "PreconditionError",
    "Prompt",
    "Registration",
    "ResourceExhaustedError",
    "RetryPolicy",
    "SamplingOptions",
    "ServerInfo",
    "SpeedFigures",
    "TokenLogprob",
    "TokenLogprobs",
    "UnavailableError",
    "Unregistration",
    "UploadProgress",
    "Usage",
]
