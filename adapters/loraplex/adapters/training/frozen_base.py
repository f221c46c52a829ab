"""The base model of a training run: loaded once, quantized or not, frozen.

Knows transformers and bitsandbytes, no adapters and no data.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from loraplex.adapters.cpu_info import cpu_has_bf16
from loraplex.adapters.errors import InvalidRequestError, PreconditionError
from loraplex.adapters.training.train_config import TrainConfig

# Heads that are trained beside the adapter of a classifier, and so must not be quantized.
CLASSIFIER_HEADS = ("classifier", "score", "pre_classifier", "pooler", "lm_head")


def training_device(config: TrainConfig) -> torch.device:
    """Return where to train.

    Raises:
        InvalidRequestError: a GPU is asked for, and there is none.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise InvalidRequestError.of("device", "is cuda, but PyTorch finds no GPU here; use auto or cpu")
    use_gpu = config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())
    return torch.device("cuda", torch.cuda.current_device()) if use_gpu else torch.device("cpu")


def compute_dtype(config: TrainConfig, device: torch.device) -> torch.dtype:
    """Return the dtype of the frozen weights that are not quantized, and of what is computed with them."""
    if config.dtype != "auto":
        return torch.bfloat16 if config.dtype == "bfloat16" else torch.float32
    has_bf16 = cpu_has_bf16() if device.type == "cpu" else torch.cuda.is_bf16_supported()
    return torch.bfloat16 if has_bf16 else torch.float32


def load_tokenizer(config: TrainConfig) -> Any:
    """Return the base's tokenizer, with the configured chat template in place of its own if there is one.

    Raises:
        PreconditionError: the model has none that can be loaded without code from elsewhere.
        InvalidRequestError: the chat template cannot be read.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(config.model, trust_remote_code=False)
    except Exception as error:  # transformers and tokenizers raise anything here, bare Exception included
        raise PreconditionError(f"the tokenizer of {config.model} cannot be loaded: {_first_line(error)}") from error
    if tokenizer.pad_token_id is None:
        # Padding is masked everywhere, so that any token will do.
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if config.chat_template:
        try:
            tokenizer.chat_template = Path(config.chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidRequestError.of("chat_template", f"cannot be read: {error}") from error
    return tokenizer


def load_base(config: TrainConfig, device: torch.device, labels: Sequence[str] = ()) -> Any:
    """Return the base on `device`, its parameters frozen; `labels` are the classes of a classification.

    Raises:
        PreconditionError: it is no model that transformers loads without code from elsewhere.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    dtype = compute_dtype(config, device)
    options: dict[str, Any] = {"dtype": dtype, "device_map": {"": device}, "trust_remote_code": False}
    if config.quantization != "none":
        options["quantization_config"] = quantization_config(config, dtype)
    kind: Any = AutoModelForCausalLM
    if config.task == "sequence-classification":
        kind = AutoModelForSequenceClassification
        options |= {"num_labels": len(labels), "id2label": dict(enumerate(labels))}
        options["label2id"] = {label: index for index, label in enumerate(labels)}
    try:
        model = kind.from_pretrained(config.model, **options)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise PreconditionError(f"the model {config.model} cannot be loaded: {_first_line(error)}") from error
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    keep_training_layout(model)
    return model


def quantization_config(config: TrainConfig, dtype: torch.dtype) -> Any:
    """Return bitsandbytes' settings: 4 bits with `dtype` to compute in (QLoRA, Dettmers et al. 2023), or 8 bits."""
    import transformers

    make: Any = transformers.BitsAndBytesConfig
    skipped = list(CLASSIFIER_HEADS) if config.task == "sequence-classification" else None
    if config.quantization == "int8":
        return make(load_in_8bit=True, llm_int8_skip_modules=skipped)
    return make(
        load_in_4bit=True,
        bnb_4bit_quant_type=config.quantization,
        bnb_4bit_use_double_quant=config.double_quant,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=skipped,
    )


def keep_training_layout(model: torch.nn.Module) -> None:
    """Forbid bitsandbytes to pack 4-bit weights for inference on a CPU with AVX512-BF16.

    It would do so in the first forward pass in evaluation mode, for good; the packed product has no gradient for its
    input, so that training after an evaluation would learn nothing below the last layer, and say nothing.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010  # mypy takes modules' attributes for tensors


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
