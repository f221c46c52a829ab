"""DoRA over a quantized base: its norms are those of the weights that bitsandbytes' own codes stand for.

bitsandbytes turns the weights of its 4-bit modules into another layout at the first forward on some CPUs, and
dequantizes them wrongly from then on; so adapters are packed here after the model has run.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from loraplex.adapters.binding import ModuleWeights
from loraplex.adapters.bnb import import_bitsandbytes
from loraplex.server.lora.ops.interface import LoraContext, make_lora_ops
from loraplex.server.lora.packing import pack_adapter
from loraplex.server.lora.segments import Segment
from loraplex.server.models.layout import LM_HEAD
from loraplex.server.models.loader import LoadedModel, load_model
from tests.parity.adapter_variants import Draw, Edited, dora
from tests.parity.paged_rows import PagedRows
from tests.parity.test_quantization import bitsandbytes_module, bitsandbytes_values
from tests.parity.tiny_models import VOCAB, TinyModel

CPU = torch.device("cpu")
# Whole blocks in every row and outputs in groups of 32, as the fused kernel wants them.
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
TINY = TinyModel("quantized-dora", "llama", SIZES)
TOKENS = torch.randint(3, VOCAB, (14,), generator=torch.Generator().manual_seed(5)).tolist()


def quantize(model: PreTrainedModel, names: list[str], quantization: str) -> None:
    """Let `model` have the values that bitsandbytes makes of its weights."""
    bnb = import_bitsandbytes()
    for name in names:
        weight = model.get_submodule(name).get_parameter("weight")
        module = bitsandbytes_module(bnb, weight.data, quantization)
        weight.data = bitsandbytes_values(bnb, module).clone()


def expected_factors(model: PreTrainedModel, name: str, weights: ModuleWeights) -> torch.Tensor:
    """Return magnitude over norm in float64."""
    assert weights.magnitude is not None
    weight = model.get_submodule(name).get_parameter("weight").detach().double()
    return weights.magnitude / (weight + weights.scaling * weights.b.double() @ weights.a.double()).norm(dim=1)


def logits(model: LoadedModel, lora: LoraContext | None) -> torch.Tensor:
    rows = PagedRows(model.decoder, [TOKENS], model.dtype)
    rows.advance({0: len(TOKENS)}, lora)
    return torch.stack(rows.logits[0])


@pytest.mark.parametrize("quantization", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize(
    ("dtype", "execution"), [("float32", "packed"), ("float32", "dequantized"), ("bfloat16", "packed")]
)
def test_norms_are_those_of_the_quantized_weights(
    quantization: str, dtype: str, execution: str, tmp_path: Path
) -> None:
    reference = TINY.save(tmp_path)
    model = load_model(str(tmp_path), quantization=quantization, dtype=dtype, weight_execution=execution)
    before = logits(model, None)
    adapter = dora(model.base, Draw(1))
    packed = pack_adapter(adapter, model.decoder.sites, torch.float32, CPU, model.decoder.base)
    quantize(reference, [name for name in model.base.modules if name != LM_HEAD], quantization)

    for index, site in enumerate(model.decoder.sites):
        factors = packed.changes[index].factors if index in packed.changes else None
        for name, (start, end) in site.targets.items():
            if adapter.modules[name].magnitude is not None:
                assert factors is not None
                expected = expected_factors(reference, name, adapter.modules[name])
                torch.testing.assert_close(factors[start:end].double(), expected, rtol=1e-5, atol=0)

    ops = make_lora_ops(CPU)
    prepared = ops.prepare([Segment(0, len(TOKENS), 0)], {0: packed})
    ours = logits(model, LoraContext(ops, prepared, prepared))
    with torch.inference_mode():
        adapted = Edited(model.base, 1.0).model(reference, adapter)(torch.tensor([TOKENS])).logits[0]
    exact = dtype == "float32"
    tolerance = 1e-4 if exact else 0.1 * float(adapted.std())
    assert (ours - adapted).abs().mean() < tolerance
    assert (before - adapted).abs().mean() > 0.2
    assert torch.equal(logits(model, None), before), "packing leaves the base as it is"
