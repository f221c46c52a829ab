"""Turns a checkpoint's tensors, in whatever order they come, into a decoder.

Each packed product is made, and quantized, as soon as its last part is there, and the parts are let go: memory stays
near one file's tensors plus what is finished.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from loraplex.server.attention.interface import Attention, AttentionParams
from loraplex.server.models.activations import make_activation
from loraplex.server.models.config import DecoderConfig
from loraplex.server.models.decoder import Decoder, DecoderLayer, DecoderParts, Projection
from loraplex.server.models.layout import LM_HEAD, LayerVectors, Layout
from loraplex.server.models.norms import Norm, RmsNorm, make_norm
from loraplex.server.models.quantization import Linear
from loraplex.server.models.rotary import Rotary

# Packs weights (out_i, in) into one product; told the name of the site.
Pack = Callable[[str, Sequence[torch.Tensor]], Linear]


class DecoderBuilder:
    """Collects tensors by their Hugging Face names; `match_tensors` has checked that all will come."""

    def __init__(
        self, config: DecoderConfig, layout: Layout, pack: Pack, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._config = config
        self._layout = layout
        self._pack = pack
        self._dtype = dtype
        self._device = device
        self._site_of = {module.name: index for index, linear in enumerate(layout.linears) for module in linear.modules}
        self._parts: dict[int, dict[str, torch.Tensor]] = {}
        self._linears: dict[int, Linear] = {}
        self._vectors: dict[str, torch.Tensor] = {}
        self.weight_bytes = 0
        """Memory of everything that `build` put into the decoder, vectors as they were stored."""

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Take one tensor, which may be a view of a mapped file; `name` is one of `Layout.shapes()`."""
        module, _, kind = name.rpartition(".")
        site = self._site_of.get(module)
        if site is None or kind != "weight" or module == LM_HEAD:
            # Copied, so that the mapping of the file can go. lm_head may be tied to an embedding still to come.
            self._vectors[name] = tensor.to(self._device, copy=True)
            return
        linear = self._layout.linears[site]
        parts = self._parts.setdefault(site, {})
        parts[module] = tensor.t().contiguous() if self._layout.names.conv1d else tensor
        if len(parts) == len(linear.modules):
            del self._parts[site]
            self._linears[site] = self._pack(linear.name, [parts[module.name] for module in linear.modules])

    def build(self, attention: Attention) -> Decoder:
        """Return the decoder, once every tensor has been added."""
        positions, rope = self._layout.positions, self._config.rope
        tied = self._make_embeddings()
        embedding = self._vectors[self._layout.embedding]
        parts = DecoderParts(
            embedding=embedding,
            positions=self._vectors[positions].to(self._dtype) if positions else None,
            rotary=Rotary(rope, self._dtype, self._device) if rope else None,
            layers=tuple(self._layer(index, names) for index, names in enumerate(self._layout.layers)),
            final_norm=self._norm(self._layout.final_norm),
            lm_head=self._linears[len(self._layout.linears) - 1],
        )
        self.weight_bytes = sum(linear.nbytes for linear in self._linears.values())
        self.weight_bytes += sum(vector.nbytes for vector in self._vectors.values())
        if tied:
            self.weight_bytes -= embedding.nbytes
        sites = [linear.site for linear in self._layout.linears]
        return Decoder(self._config, parts, sites, attention, self._dtype)

    def _make_embeddings(self) -> bool:
        """Settle the embedding matrix and make lm_head; return whether they are one matrix in memory."""
        table = self._vectors.get(self._layout.embedding)
        head = self._vectors.pop(f"{LM_HEAD}.weight", None)
        # As transformers does: two different matrices are not tied, whatever the configuration says.
        tied = self._config.tied_embeddings and (table is None or head is None or torch.equal(table, head))
        table = head if table is None else table
        assert table is not None, "an embedding matrix was checked to be there"
        if tied or table.itemsize > self._dtype.itemsize:
            table = table.to(self._dtype)
        if tied:
            head = table
        assert head is not None, "an lm_head was checked to be there"
        self._vectors[self._layout.embedding] = table
        self._linears[len(self._layout.linears) - 1] = self._pack(LM_HEAD, [head])
        return tied

    def _layer(self, index: int, names: LayerVectors) -> DecoderLayer:
        config, first = self._config, 4 * index
        cap, window = config.attention_softcap, config.windows[index]
        return DecoderLayer(
            input_norm=self._norm(names.input_norm),
            qkv=self._projection(first),
            qk_norm=self._qk_norm(names),
            o=self._projection(first + 1),
            post_attention_norm=self._norm(names.post_attention_norm) if names.post_attention_norm else None,
            mlp_norm=self._norm(names.mlp_norm),
            gate_up=self._projection(first + 2),
            activation=make_activation(config.activation, self._device, gated=config.gated_mlp),
            down=self._projection(first + 3),
            post_mlp_norm=self._norm(names.post_mlp_norm) if names.post_mlp_norm else None,
            params=AttentionParams(config.attention_scales[index], cap, window),
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
        )

    def _projection(self, site: int) -> Projection:
        modules = self._layout.linears[site].modules
        biases = [self._vectors[f"{module.name}.bias"] for module in modules if module.bias]
        return Projection(self._linears[site], torch.cat(biases).to(self._dtype) if biases else None, site)

    def _norm(self, name: str) -> Norm:
        weight, bias = self._vectors[f"{name}.weight"], self._vectors.get(f"{name}.bias")
        return make_norm(self._config.norm, self._config.norm_eps, weight, bias, self._dtype)

    def _qk_norm(self, names: LayerVectors) -> Norm | None:
        """Return one norm for the heads of q and k together: a row of weights per head."""
        if names.q_norm is None or names.k_norm is None:
            return None
        q, k = (self._vectors[f"{name}.weight"].to(self._dtype) for name in (names.q_norm, names.k_norm))
        rows = [q] * self._config.num_heads + [k] * self._config.num_kv_heads
        return RmsNorm(torch.stack(rows), self._config.norm_eps)
