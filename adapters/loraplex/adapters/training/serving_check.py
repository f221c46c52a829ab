"""Can a server of the base serve this adapter? Asked of the files as they are, by the code that a server asks."""

from __future__ import annotations

from pathlib import Path

from loraplex.adapters.binding import bind
from loraplex.adapters.errors import PreconditionError
from loraplex.adapters.formats import read_adapter
from loraplex.adapters.model_folder import ModelFolder
from loraplex.adapters.training.train_config import TrainConfig

CLASSIFIER_REASON = (
    "a server generates text with a causal language model and has no head for classes; merge it instead "
    "(`loraplex merge`), and load the result with transformers"
)


def serving_problem(adapter: Path, config: TrainConfig) -> str:
    """Return why the adapter in the folder `adapter` cannot be served on its base; empty if it can."""
    if config.task == "sequence-classification":
        return CLASSIFIER_REASON
    try:
        bind(read_adapter(adapter), ModelFolder.open(base_folder(config.model)).base_model())
    except PreconditionError as error:
        return str(error)
    return ""


def base_folder(model: str) -> Path:
    """Return the folder of the base's files: `model` itself, or what the hub's client has fetched of it.

    Raises:
        PreconditionError: the files are not there.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, allow_patterns=["*.json", "*.safetensors"], local_files_only=True))
    except Exception as error:  # the hub's client has many errors, of no common kind
        raise PreconditionError(f"the files of {model} are not in the hub's cache: {error!s:.200}") from error
