"""Turns a checkpoint's tensors, in whatever order they come, into a decoder.

Each packed product is made, and quantized, as soon as its last part is there, and the parts are let go: memory stays
near one file's tensors plus what is finished.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch

from loraplex.server.attention.interface import Attention, AttentionParams
from loraplex.server.errors import ModelLoadError
from loraplex.server.lora.base import BaseNorm, BaseParameters
from loraplex.server.lora.copies import matrix_digest
from loraplex.server.models.activations import make_activation
from loraplex.server.models.config import DecoderConfig
from loraplex.server.models.decoder import Decoder, DecoderParts
from loraplex.server.models.layer import DecoderLayer, Projection
from loraplex.server.models.layout import LM_HEAD, Layout
from loraplex.server.models.linear import DenseLinear, Linear
from loraplex.server.models.norm_places import FINAL_NORM, QK_NORM, base_norms, layer_place
from loraplex.server.models.norms import Norm
from loraplex.server.models.rotary import Rotary

_HEAD_WEIGHT = f"{LM_HEAD}.weight"

# One module's weight: {"weight": (out, in)}, or as bitsandbytes stored it quantized, with more names.
StoredWeight = Mapping[str, torch.Tensor]
# Packs the weights of a site, which it is told the name of, into one product.
Pack = Callable[[str, Sequence[StoredWeight]], Linear]


@dataclass(frozen=True)
class _Place:
    """Where a tensor belongs: the site, the module in it, and which part of the module's weight it is."""

    site: int
    module: str
    part: str


class DecoderBuilder:
    """Collects tensors by their Hugging Face names."""

    def __init__(
        self,
        config: DecoderConfig,
        layout: Layout,
        names: Collection[str],
        pack: Pack,
        dtype: torch.dtype,
        activations: torch.dtype,
        device: torch.device,
    ) -> None:
        """Expect the tensors `names`, which `match_tensors` has found to be all that are needed.

        `dtype` is that of the embedding, `activations` that of what flows between the products.
        """
        self._config = config
        self._layout = layout
        self._pack = pack
        self._dtype = dtype
        self._activations = activations
        self._device = device
        self._site_of = {module.name: index for index, linear in enumerate(layout.linears) for module in linear.modules}
        self._places = {name: place for name in names if (place := self._place(name)) is not None}
        self._awaited = Counter(place.site for place in self._places.values())
        self._parts: dict[int, dict[str, dict[str, torch.Tensor]]] = {}
        self._linears: dict[int, Linear] = {}
        self._vectors: dict[str, torch.Tensor] = {}
        self.weight_bytes = 0
        """Memory of everything that `build` put into the decoder, vectors as they were stored."""
        self.tied = False
        """Whether `build` made lm_head of the embedding matrix."""
        self._head_digest = ""

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Take one tensor, which may be a view of a mapped file."""
        place = self._places.get(name)
        if place is None:
            self._vectors[name] = tensor.to(self._device, copy=True)  # copied, so that the mapping of the file can go
            return
        self._parts.setdefault(place.site, {}).setdefault(place.module, {})[place.part] = tensor
        self._awaited[place.site] -= 1
        if not self._awaited[place.site]:
            self._linears[place.site] = self._packed(place.site, self._parts.pop(place.site))

    def _place(self, name: str) -> _Place | None:
        """Return where a tensor belongs, None for vectors: all that is no matrix of a layer, and a plain lm_head."""
        module, _, part = name.rpartition(".")
        while module and module not in self._site_of:
            module, _, before = module.rpartition(".")
            part = f"{before}.{part}"
        if not module or part == "bias" or name == _HEAD_WEIGHT:
            return None  # lm_head may be tied to an embedding still to come
        return _Place(self._site_of[module], module, part)

    def _packed(self, site: int, parts: Mapping[str, StoredWeight]) -> Linear:
        linear = self._layout.linears[site]
        weights = [self._detached(parts[module.name], alone=len(parts) == 1) for module in linear.modules]
        try:
            packed = self._pack(linear.name, weights)
        except ModelLoadError as error:
            raise ModelLoadError(f"{', '.join(module.name for module in linear.modules)}: {error}") from error
        expected = (linear.site.in_features, linear.site.out_features)
        if (packed.in_features, packed.out_features) != expected:
            raise ModelLoadError(
                f"the quantized weights of {', '.join(parts)} are for {packed.in_features} inputs and "
                f"{packed.out_features} outputs instead of {expected[0]} and {expected[1]}"
            )
        return packed

    def _detached(self, weight: StoredWeight, *, alone: bool) -> StoredWeight:
        """Return a module's weight as (out, in), not in the file's mapping any more if it might be used as it is."""
        if len(weight) > 1:
            return {part: tensor.clone() for part, tensor in weight.items()}
        if self._layout.names.conv1d:  # bitsandbytes turns the weights that it quantizes: those above lie right
            return {"weight": weight["weight"].t().contiguous()}
        return {"weight": weight["weight"].clone()} if alone else weight

    def build(self, attention: Attention) -> Decoder:
        """Return the decoder, once every tensor has been added."""
        positions, rope = self._layout.positions, self._config.rope
        norms = base_norms(self._layout, self._config, self._vectors, self._activations)
        made = {place: norm.norm() for place, norm in norms.items()}
        self.tied = self._make_embeddings()
        embedding = self._vectors[self._layout.embedding]
        parts = DecoderParts(
            embedding=embedding,
            positions=self._vectors[positions].to(self._activations) if positions else None,
            rotary=Rotary(rope, self._activations, self._device) if rope else None,
            layers=tuple(self._layer(index, made) for index in range(self._config.num_layers)),
            final_norm=made[FINAL_NORM],
            lm_head=self._linears[len(self._layout.linears) - 1],
        )
        self.weight_bytes = sum(linear.nbytes for linear in self._linears.values())
        self.weight_bytes += sum(vector.nbytes for vector in self._vectors.values())
        if self.tied and isinstance(parts.lm_head, DenseLinear) and embedding.dtype == self._activations:
            self.weight_bytes -= embedding.nbytes  # the same memory
        sites = [linear.site for linear in self._layout.linears]
        return Decoder(self._config, parts, sites, self._base(norms), attention, self._activations)

    def _base(self, norms: Mapping[str, BaseNorm]) -> BaseParameters:
        modules = [module for linear in self._layout.linears for module in linear.modules]
        across = {f"{module.name}.weight" for module in modules if module.name != LM_HEAD}
        layout, activations = self._layout, self._activations
        biases = {name: self._vectors[name] for name in (f"{module.name}.bias" for module in modules if module.bias)}
        shapes = layout.shapes()
        return BaseParameters(
            weights=[self._linears[site] for site in range(len(layout.linears))],
            biases={name: bias.to(activations) for name, bias in biases.items()},
            activations=activations,
            norms=norms,
            tables={name: (shapes[name][0], shapes[name][1]) for name in (layout.embedding, layout.positions) if name},
            embedding=layout.embedding,
            positions=layout.positions,
            stored_across=across if layout.names.conv1d else (),
            table=self._vectors[layout.embedding],
            tied=self.tied,
            head_digest=self._head_digest,
        )

    def _make_embeddings(self) -> bool:
        """Settle the embedding matrix and make lm_head; return whether lm_head is made of the same tensor."""
        table = self._vectors.get(self._layout.embedding)
        head = self._vectors.pop(_HEAD_WEIGHT, None)
        # As transformers does: two different matrices are not tied, whatever the configuration says.
        tied = self._config.tied_embeddings and (table is None or head is None or torch.equal(table, head))
        table = head if table is None else table
        assert table is not None, "an embedding matrix was checked to be there"
        if table.itemsize >= self._dtype.itemsize:  # narrower ones stay: looking up widens exactly
            table = table.to(self._dtype)
        self._vectors[self._layout.embedding] = table
        last = len(self._layout.linears) - 1
        if last in self._linears:  # the checkpoint holds it quantized
            return False
        weight = table if tied else head
        assert weight is not None, "an lm_head was checked to be there"
        self._linears[last] = self._pack(LM_HEAD, [{"weight": weight}])
        if not tied:
            self._head_digest = matrix_digest(weight, self._activations)
        return tied

    def _layer(self, index: int, norms: Mapping[str, Norm]) -> DecoderLayer:
        config, first = self._config, 4 * index

        def norm(field: str) -> Norm | None:
            return norms.get(layer_place(index, field))

        cap, window = config.attention_softcap, config.windows[index]
        return DecoderLayer(
            input_norm=norms[layer_place(index, "input_norm")],
            qkv=self._projection(first),
            qk_norm=norm(QK_NORM),
            o=self._projection(first + 1),
            post_attention_norm=norm("post_attention_norm"),
            mlp_norm=norms[layer_place(index, "mlp_norm")],
            gate_up=self._projection(first + 2),
            activation=make_activation(config.activation, self._device, gated=config.gated_mlp),
            down=self._projection(first + 3),
            post_mlp_norm=norm("post_mlp_norm"),
            params=AttentionParams(config.attention_scales[index], cap, window),
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
        )

    def _projection(self, site: int) -> Projection:
        modules = self._layout.linears[site].modules
        biases = [self._vectors[f"{module.name}.bias"] for module in modules if module.bias]
        return Projection(self._linears[site], torch.cat(biases).to(self._activations) if biases else None, site)
