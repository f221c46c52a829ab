"""Adapters that PEFT has converted, and adapters whose modules the base has in another layout, against PEFT."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, replace_lora_weights_loftq
from peft.tuners.lora.config import LoraGAConfig
from peft.tuners.lora.eva import initialize_lora_eva_weights
from peft.tuners.lora.loraga import preprocess_loraga
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from loraplex.adapters.binding import bind
from loraplex.adapters.errors import AdapterFormatError
from loraplex.adapters.formats import read_adapter
from loraplex.adapters.model_folder import ModelFolder
from tests.parity.bound_reference import bound_logits
from tests.parity.peft_formats import PHI3, TIED, UNTIED, PeftFormat, peft_logits, randomize, tiny_base

TOKENS = torch.tensor([[3, 9, 11, 12, 14, 5], [6, 9, 3, 14, 22, 5]])
WEIGHTS = "adapter_model.safetensors"
# CorDA is the fourth of its kind; PEFT's own preparation for it needs a package that PEFT does not ask for.
CHANGING = ["pissa", "pissa_niter_4", "olora", "lora_ga"]


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("untied")
    tiny_base(UNTIED, folder)
    return folder


def load(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").float().eval()
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model.eval()(input_ids=TOKENS).logits
    return found


def changed(untied: Path, init: Any) -> PeftModel:
    """A model whose base PEFT has changed to start an adapter, not trained yet."""
    model = load(untied)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights=init)
    if init == "lora_ga":
        config.lora_ga_config = LoraGAConfig()
        preprocess_loraga(model, config, lambda: model(input_ids=TOKENS, labels=TOKENS).loss.backward())
    return get_peft_model(model, config)


@pytest.mark.parametrize("init", CHANGING)
def test_what_peft_converted_is_plain_and_what_it_did_not_is_refused(untied: Path, tmp_path: Path, init: str) -> None:
    model = changed(untied, init)
    started = tmp_path / "started"
    config: Any = model.peft_config["default"]
    config.init_lora_weights = True  # as PEFT's documentation asks for
    model.save_pretrained(str(started))
    config.init_lora_weights = init
    randomize(model, init)
    model.save_pretrained(str(tmp_path / "unconverted"))
    trained = logits(model)
    model.save_pretrained(str(tmp_path / "converted"), path_initial_model_for_weight_conversion=str(started))
    with pytest.raises(AdapterFormatError, match=r"path_initial_model_for_weight_conversion") as refused:
        read_adapter(tmp_path / "unconverted")
    assert [v.field for v in refused.value.violations] == ["init_lora_weights"]
    adapter = read_adapter(tmp_path / "converted")
    assert adapter.spec.rank == 8
    base = ModelFolder.open(untied).base_model()
    found = bound_logits(load(untied), base, bind(adapter, base), TOKENS)
    torch.testing.assert_close(found, trained, rtol=1e-4, atol=1e-3)


def test_eva_leaves_plain_lora_with_a_rank_for_each_module(untied: Path, tmp_path: Path) -> None:
    model = load(untied)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights="eva")
    wrapped = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(1)
    batches = [{"input_ids": torch.randint(3, 90, (4, 16), generator=generator)} for _ in range(6)]
    initialize_lora_eva_weights(wrapped, dataloader=batches)
    randomize(wrapped, "eva")
    wrapped.save_pretrained(str(tmp_path))
    adapter = read_adapter(tmp_path)
    assert len({pair.a.shape[0] for pair in adapter.pairs.values()}) > 1, "EVA gave all modules one rank"
    base = ModelFolder.open(untied).base_model()
    found = bound_logits(load(untied), base, bind(adapter, base), TOKENS)
    torch.testing.assert_close(found, peft_logits(load(untied), tmp_path, TOKENS), rtol=1e-4, atol=1e-4)


def test_loftq_is_refused_by_name(tmp_path: Path) -> None:
    PeftFormat("plain", {"target_modules": ["q_proj"]}).save(tiny_base(TIED, tmp_path / "base"), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config |= {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterFormatError, match=replace_lora_weights_loftq.__name__):
        read_adapter(tmp_path)


class Twins:
    """Phi-3, whose projections are fused, and the Llama with the same weights, in parts."""

    def __init__(self, folder: Path) -> None:
        self.fused_folder, self.split_folder = folder / "fused", folder / "split"
        self.fused = tiny_base(PHI3, self.fused_folder)
        known = self.fused.config.to_dict()
        keys = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
        keys += ["num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "pad_token_id"]
        rope = {"rope_type": "default", "rope_theta": 1e4}
        # Only where each head is rotated whole are the two models one.
        self.fused.config.rope_parameters = {**rope, "partial_rotary_factor": 1.0}
        self.fused.config.save_pretrained(self.fused_folder)
        self.fused = load(self.fused_folder)
        config = LlamaConfig(**{key: known[key] for key in keys}, rope_parameters=rope)
        split = LlamaForCausalLM(config)
        split.load_state_dict(self._divided(config))
        split.save_pretrained(self.split_folder)
        self.split = load(self.split_folder)

    def _divided(self, config: Any) -> dict[str, torch.Tensor]:
        width = config.hidden_size // config.num_attention_heads
        sizes = [config.hidden_size, *[width * config.num_key_value_heads] * 2]
        found: dict[str, torch.Tensor] = {}
        for name, tensor in self.fused.state_dict().items():
            if "qkv_proj" in name:
                parts = zip("qkv", torch.split(tensor, sizes), strict=True)
                found |= {name.replace("qkv_proj", f"{part}_proj"): rows for part, rows in parts}
            elif "gate_up_proj" in name:
                parts = zip(("gate", "up"), torch.chunk(tensor, 2), strict=True)
                found |= {name.replace("gate_up_proj", f"{part}_proj"): rows for part, rows in parts}
            else:
                found[name] = tensor
        return found


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> Twins:
    made = Twins(tmp_path_factory.mktemp("twins"))
    torch.testing.assert_close(logits(made.fused), logits(made.split), rtol=1e-4, atol=1e-4)
    return made


FUSED = [
    PeftFormat("fused", {"target_modules": ["qkv_proj", "gate_up_proj"], "lora_bias": True}),
    PeftFormat("fused-dora", {"target_modules": "all-linear", "use_dora": True}),
]
IN_PARTS = [
    PeftFormat("query-value", {"target_modules": ["q_proj", "v_proj"], "lora_bias": True}),
    PeftFormat("key", {"target_modules": ["k_proj", "up_proj"]}),
    PeftFormat("value", {"target_modules": ["v_proj"]}),
    PeftFormat("query", {"target_modules": ["q_proj", "gate_proj"]}),
    PeftFormat("all", {"target_modules": "all-linear", "rank_pattern": {"k_proj": 2}, "alpha_pattern": {"k_proj": 4}}),
    PeftFormat("all-dora", {"target_modules": "all-linear", "use_dora": True}),
    PeftFormat("some-layers", {"target_modules": ["q_proj", "k_proj"], "layers_to_transform": [1]}),
]


@pytest.mark.parametrize("made", FUSED, ids=lambda made: made.name)
def test_an_adapter_for_fused_modules_fits_a_base_in_parts(twins: Twins, tmp_path: Path, made: PeftFormat) -> None:
    made.save(twins.fused, tmp_path)
    base = ModelFolder.open(twins.split_folder).base_model()
    bound = bind(read_adapter(tmp_path), base)
    assert not any("qkv_proj" in name for name in bound.modules)
    found = bound_logits(twins.split, base, bound, TOKENS)
    torch.testing.assert_close(found, peft_logits(twins.fused, tmp_path, TOKENS), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("made", IN_PARTS, ids=lambda made: made.name)
def test_an_adapter_in_parts_fits_a_fused_base(twins: Twins, tmp_path: Path, made: PeftFormat) -> None:
    made.save(twins.split, tmp_path)
    base = ModelFolder.open(twins.fused_folder).base_model()
    bound = bind(read_adapter(tmp_path), base)
    assert any("qkv_proj" in name for name in bound.modules)
    found = bound_logits(twins.fused, base, bound, TOKENS)
    torch.testing.assert_close(found, peft_logits(twins.split, tmp_path, TOKENS), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("prefix", "head"),
    [
        ("base_model.model.layers.", "base_model.model.lm_head."),
        ("base_model.model.model.language_model.layers.", "base_model.model.lm_head."),
        ("base_model.model.language_model.model.layers.", "base_model.model.language_model.lm_head."),
        ("base_model.model.base_model.model.model.layers.", "base_model.model.base_model.model.lm_head."),
        ("model.layers.", "lm_head."),
        ("layers.", "lm_head."),
    ],
)
def test_the_same_decoder_inside_another_class(untied: Path, tmp_path: Path, prefix: str, head: str) -> None:
    made = PeftFormat("moved", {"target_modules": ["q_proj", "lm_head"], "rank_pattern": {r"layers\.1\..*": 2}})
    made.save(load(untied), tmp_path)
    expected = peft_logits(load(untied), tmp_path, TOKENS)
    tensors = load_file(tmp_path / WEIGHTS)
    renamed = {
        key.replace("base_model.model.model.layers.", prefix).replace("base_model.model.lm_head.", head): tensor
        for key, tensor in tensors.items()
    }
    assert renamed.keys() != tensors.keys()
    save_file(renamed, tmp_path / WEIGHTS)
    base = ModelFolder.open(untied).base_model()
    found = bound_logits(load(untied), base, bind(read_adapter(tmp_path), base), TOKENS)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_copies_of_the_base_change_what_both_matrices_are_where_it_ties_them(tmp_path: Path) -> None:
    """PEFT writes a saved base weight over the base's own; here it differs from the base that is served."""
    model = tiny_base(TIED, tmp_path / "base")
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.get_parameter("model.embed_tokens.weight").mul_(1.5)
    PeftFormat("moved", {"target_modules": ["q_proj", "embed_tokens"]}).save(other, tmp_path)
    base = ModelFolder.open(tmp_path / "base").base_model()
    bound = bind(read_adapter(tmp_path), base)
    assert set(bound.parameters) == {"model.embed_tokens.weight", "lm_head.weight"}
    expected = peft_logits(model, tmp_path, TOKENS)
    torch.testing.assert_close(bound_logits(model, base, bound, TOKENS), expected, rtol=1e-4, atol=1e-4)
