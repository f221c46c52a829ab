"""Adapters that do more at a site than add A and B: packed and run by every operator, against the definition.

The definition is taken from `BoundAdapter`'s own words, module by module and token by token, and knows nothing of
packing, sites or segments.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loraplex.adapters.binding import BoundAdapter, ModuleWeights, TokenRows
from loraplex.server.lora.base import BaseParameters
from loraplex.server.lora.dora import CACHED_BYTES, BaseWeight, FactorCache, column_factors
from loraplex.server.lora.ops.cpu import CpuLoraOps
from loraplex.server.lora.ops.interface import LoraOps
from loraplex.server.lora.ops.reference import ReferenceLoraOps
from loraplex.server.lora.ops.triton import TritonLoraOps
from loraplex.server.lora.packing import pack_adapter, packed_nbytes
from loraplex.server.lora.segments import Segment
from loraplex.server.lora.weights import LinearSite, PackedAdapter
from loraplex.server.models.linear import DenseLinear
from tests.triton_interpreter import INTERPRETED

CPU = torch.device("cpu")
FLOATS = [torch.float32, torch.bfloat16]
OPS: list[LoraOps] = [ReferenceLoraOps(), CpuLoraOps()]
ALL_OPS: list[LoraOps] = [*OPS, *([TritonLoraOps(CPU)] if INTERPRETED else [])]


def random(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=generator) / shape[-1] ** 0.5


def base_parameters(
    weights: list[BaseWeight], biases: Mapping[str, torch.Tensor], across: frozenset[str] = frozenset()
) -> BaseParameters:
    tables = {"embedding.weight": (40, 24)}
    return BaseParameters(weights, biases, torch.float32, {}, tables, "embedding.weight", stored_across=across)


@dataclass(frozen=True)
class Base:
    """A base of some sites; the weight and the bias of each module by its name."""

    sites: tuple[LinearSite, ...]
    weights: Mapping[str, torch.Tensor]
    biases: Mapping[str, torch.Tensor]
    across: frozenset[str] = frozenset()

    @classmethod
    def make(cls, sites: tuple[LinearSite, ...], seed: int = 0, across: frozenset[str] = frozenset()) -> Base:
        generator = torch.Generator().manual_seed(seed)
        sizes = {name: (end - start, s.in_features) for s in sites for name, (start, end) in s.targets.items()}
        weights = {name: random(generator, *size) for name, size in sizes.items()}
        biases = {f"{name}.bias": random(generator, out) for name, (out, _) in sizes.items() if not name.endswith("0")}
        return cls(sites, weights, biases, across)

    def parameters(self) -> BaseParameters:
        weights: list[BaseWeight] = [
            DenseLinear(torch.cat([self.weights[name] for name in site.targets])) for site in self.sites
        ]
        return base_parameters(weights, self.biases, self.across)

    def outputs(self, index: int, x: torch.Tensor) -> torch.Tensor:
        """The product of a site, before the biases."""
        return torch.cat([x @ self.weights[name].T for name in self.sites[index].targets], dim=1)

    def bias(self, index: int) -> torch.Tensor:
        zeros = {name: torch.zeros(len(self.weights[name])) for name in self.sites[index].targets}
        return torch.cat([self.biases.get(f"{name}.bias", zero) for name, zero in zeros.items()])


def defined(base: Base, adapter: BoundAdapter, name: str, x: torch.Tensor, scale: float) -> torch.Tensor:
    """What `adapter` makes of one token at one module, bias included, in float64."""
    x, weight = x.double(), base.weights[name].double()
    if f"{name}.weight" in adapter.parameters:
        weight = adapter.parameters[f"{name}.weight"].double()
        weight = weight.T if f"{name}.weight" in base.across else weight
    if f"{name}.weight" in adapter.token_rows:
        rows = adapter.token_rows[f"{name}.weight"]
        weight = weight.index_copy(0, rows.tokens, rows.rows.double())
    y = weight @ x
    if name in adapter.modules:
        module = adapter.modules[name]
        delta = module.scaling * module.b.double() @ module.a.double()
        y = y + scale * (delta @ x)
        if module.lora_bias is not None:
            y = y + scale * module.scaling * module.lora_bias.double()
        if module.magnitude is not None:
            y = y * module.magnitude.double() / (weight + delta).norm(dim=1)
    bias = adapter.parameters.get(f"{name}.bias", base.biases.get(f"{name}.bias"))
    return y if bias is None else y + bias.double()


def site(name: str, in_features: int, *widths: int) -> LinearSite:
    ends = [sum(widths[: i + 1]) for i in range(len(widths))]
    targets = {f"{name}.{i}": (end - width, end) for i, (width, end) in enumerate(zip(widths, ends, strict=True))}
    return LinearSite(name, in_features, ends[-1], targets)


@dataclass(frozen=True)
class Kind:
    """What an adapter has for one module."""

    lora: str = "plain"
    weight: str = ""
    bias: bool = False

    def add_to(self, bound: BoundAdapter, base: Base, name: str, rank: int, generator: torch.Generator) -> BoundAdapter:
        out, width = base.weights[name].shape
        modules, parameters, rows = dict(bound.modules), dict(bound.parameters), dict(bound.token_rows)
        if self.lora:
            modules[name] = ModuleWeights(
                random(generator, rank, width),
                random(generator, out, rank),
                scaling=0.5,
                magnitude=1 + random(generator, out) if self.lora == "dora" else None,
                lora_bias=random(generator, out) if self.lora == "biased" else None,
            )
        if self.weight == "whole":
            weight = random(generator, out, width)
            parameters[f"{name}.weight"] = weight.T.contiguous() if f"{name}.weight" in base.across else weight
        elif self.weight == "rows":
            tokens = torch.randperm(out, generator=generator)[: 1 + out // 2].sort().values
            rows[f"{name}.weight"] = TokenRows(tokens, random(generator, len(tokens), width))
        if self.bias and f"{name}.bias" in base.biases:
            parameters[f"{name}.bias"] = random(generator, out)
        return replace(bound, modules=modules, parameters=parameters, token_rows=rows)

    @property
    def fixed(self) -> bool:
        return self.lora == "dora"


KINDS = [
    Kind(),
    Kind("dora"),
    Kind("biased"),
    Kind("plain", bias=True),
    Kind("", bias=True),
    Kind("dora", bias=True),
    Kind("", weight="whole"),
    Kind("", weight="whole", bias=True),
    Kind("", weight="rows"),
    Kind("plain", weight="rows"),
    Kind("dora", weight="rows"),
    Kind("dora", weight="whole"),
    Kind(""),
]


def bound_adapter(base: Base, kinds: Mapping[str, Kind], rank: int, seed: int) -> BoundAdapter:
    generator = torch.Generator().manual_seed(seed)
    bound = BoundAdapter(f"sha256:{seed}", {})
    for name, kind in kinds.items():
        bound = kind.add_to(bound, base, name, rank, generator)
    return bound


@dataclass(frozen=True)
class Case:
    base: Base
    adapters: tuple[BoundAdapter, ...]
    segments: tuple[Segment, ...]
    tokens: int

    def pack(self, dtype: torch.dtype) -> dict[int, PackedAdapter]:
        parameters = self.base.parameters()
        return {
            slot: pack_adapter(bound, self.base.sites, dtype, CPU, parameters)
            for slot, bound in enumerate(self.adapters)
        }


def outputs(ops: LoraOps, case: Case, slots: Mapping[int, PackedAdapter], index: int, x: torch.Tensor) -> torch.Tensor:
    y = case.base.outputs(index, x)
    ops.add(y, x, index, ops.prepare(case.segments, slots))
    return y + case.base.bias(index)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    sizes = st.integers(1, 40)
    sites = tuple(
        site(f"s{i}", draw(sizes), *draw(st.lists(sizes, min_size=1, max_size=3)))
        for i in range(draw(st.integers(1, 2)))
    )
    across = draw(st.frozensets(st.sampled_from([f"{name}.weight" for s in sites for name in s.targets])))
    base = Base.make(sites, draw(st.integers(0, 3)), across)
    adapters = tuple(
        bound_adapter(base, {n: draw(st.sampled_from(KINDS)) for n in base.weights}, draw(st.integers(1, 20)), slot)
        for slot in range(draw(st.integers(1, 3)))
    )
    position, segments = 0, []
    for _ in range(draw(st.integers(1, 5))):
        start = position + draw(st.integers(0, 2))
        position = start + draw(st.integers(0, 30))
        slot = draw(st.integers(0, len(adapters) - 1))
        fixed = any(module.magnitude is not None for module in adapters[slot].modules.values())
        segments.append(Segment(start, position, slot, 1.0 if fixed else draw(st.floats(-2, 2, width=32))))
    return Case(base, adapters, tuple(segments), position + draw(st.integers(0, 2)))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(case=cases())
def test_operators_compute_the_definition(case: Case) -> None:
    slots, generator = case.pack(torch.float32), torch.Generator().manual_seed(1)
    for index, s in enumerate(case.base.sites):
        x = torch.randn(case.tokens, s.in_features, generator=generator)
        expected = (case.base.outputs(index, x) + case.base.bias(index)).double()
        for segment in case.segments:
            for token in range(segment.start, segment.end):
                bound = case.adapters[segment.slot]
                expected[token] = torch.cat(
                    [defined(case.base, bound, name, x[token], segment.scale) for name in s.targets]
                )
        for ops in ALL_OPS:
            torch.testing.assert_close(
                outputs(ops, case, slots, index, x).double(), expected, atol=2e-5, rtol=2e-5, msg=type(ops).__name__
            )


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(case=cases(), activations=st.sampled_from(FLOATS), weights=st.sampled_from(FLOATS))
def test_the_cpu_operator_does_what_the_reference_does(
    case: Case, activations: torch.dtype, weights: torch.dtype
) -> None:
    slots, generator = case.pack(weights), torch.Generator().manual_seed(1)
    reference, cpu = OPS
    for index, s in enumerate(case.base.sites):
        x = torch.randn(case.tokens, s.in_features, generator=generator).to(activations)
        y = case.base.outputs(index, x.float()).to(activations)
        results = []
        for ops in (reference, cpu):
            result = y.clone()
            ops.add(result, x, index, ops.prepare(case.segments, slots))
            results.append(result.float())
        if case.tokens:
            tolerance = {torch.float32: 2e-5, torch.bfloat16: 2**-6}[activations]
            largest = max(1.0, results[0].abs().max().item())
            assert (results[0] - results[1]).abs().max().item() <= tolerance * largest


SITES = (site("qkv", 24, 16, 8, 8), site("head", 24, 40))


def test_a_row_is_the_same_to_the_bit_alone_and_in_company() -> None:
    base = Base.make(SITES)
    adapters = tuple(bound_adapter(base, dict.fromkeys(base.weights, kind), 4, i) for i, kind in enumerate(KINDS))
    rows = len(adapters)
    case = Case(base, adapters, tuple(Segment(row, row + 1, row) for row in range(rows)), rows)
    slots, ops = case.pack(torch.float32), CpuLoraOps()
    for index, s in enumerate(SITES):
        x = torch.randn(rows, s.in_features)
        y = base.outputs(index, x)
        together = y.clone()
        ops.add(together, x, index, ops.prepare(case.segments, slots))
        for row in range(rows):
            alone = y[row : row + 1].clone()
            ops.add(alone, x[row : row + 1], index, ops.prepare([Segment(0, 1, row)], slots))
            assert torch.equal(alone[0], together[row]), (s.name, KINDS[row])


def test_a_change_stays_in_its_module_and_its_rows() -> None:
    base = Base.make(SITES)
    bound = bound_adapter(base, {"qkv.1": Kind("dora", bias=True)}, 4, 1)
    packed = pack_adapter(bound, SITES, torch.float32, CPU, base.parameters())
    assert list(packed.changes) == [0]
    for ops in ALL_OPS:
        x = torch.randn(3, 24)
        y = base.outputs(0, x)
        result = y.clone()
        ops.add(result, x, 0, ops.prepare([Segment(1, 2, 0)], {0: packed}))
        changed = (result != y).nonzero()
        assert set(changed[:, 0].tolist()) == {1}
        assert set(changed[:, 1].tolist()) == set(range(16, 24))
        head = base.outputs(1, x)
        ops.add(head, x, 1, ops.prepare([Segment(1, 2, 0)], {0: packed}))
        assert torch.equal(head, base.outputs(1, x))


@pytest.mark.parametrize("kind", KINDS)
def test_everything_lies_in_one_block_and_is_counted(kind: Kind) -> None:
    base = Base.make(SITES)
    bound, parameters = bound_adapter(base, dict.fromkeys(base.weights, kind), 4, 1), base.parameters()
    packed = pack_adapter(bound, SITES, torch.bfloat16, CPU, parameters)
    assert packed.nbytes == packed_nbytes(bound, SITES, torch.bfloat16, parameters)
    changes = list(packed.changes.values())
    tensors = [t for slices in packed.sites for s in slices for t in (s.a, s.b_t)]
    tensors += [t for c in changes for t in (c.factors, c.scaled_bias, c.bias) if t is not None]
    tensors += [columns.weight for c in changes for columns in c.columns]
    tensors += [t for c in changes for rows in c.rows for t in (rows.tokens, rows.rows)]
    assert packed.memory is not None
    assert packed.memory.nbytes == packed.nbytes
    assert {t.untyped_storage().data_ptr() for t in tensors} <= {packed.memory.data_ptr()}
    assert sum(t.nbytes for t in tensors) <= packed.nbytes < sum(t.nbytes for t in tensors) + 64 * len(tensors) + 1
    away = packed.to(torch.device("meta"))
    for change in away.changes.values():
        vectors = [v for v in (change.factors, change.scaled_bias, change.bias) if v is not None]
        assert all(t.device.type == "meta" for t in [*vectors, *(c.weight for c in change.columns)])
        assert all(t.device.type == "meta" for rows in change.rows for t in (rows.tokens, rows.rows))


def test_equal_memory_is_packed_once() -> None:
    base = Base.make(SITES)
    weight = torch.randn(8, 24)
    twice = replace(BoundAdapter("d", {}), parameters={"qkv.1.weight": weight, "qkv.2.weight": weight})
    assert packed_nbytes(twice, SITES, torch.float32, base.parameters()) == weight.nbytes


def test_factors_are_not_used_at_another_scale() -> None:
    base = Base.make(SITES)
    packed = pack_adapter(
        bound_adapter(base, {"qkv.0": Kind("dora")}, 2, 0), SITES, torch.float32, CPU, base.parameters()
    )
    for ops in ALL_OPS:
        with pytest.raises(ValueError, match="scale 1 only"):
            ops.prepare([Segment(0, 1, 0, 0.5)], {0: packed})


def refused(bound: BoundAdapter, base: BaseParameters | None) -> str:
    with pytest.raises(ValueError, match="adapter") as caught:
        pack_adapter(bound, SITES, torch.float32, CPU, base)
    return str(caught.value)


def test_what_has_no_place_is_refused_by_name() -> None:
    base = Base.make(SITES)
    parameters = base.parameters()
    plain = bound_adapter(base, {"qkv.0": Kind()}, 2, 0)
    assert "model.norm.weight" in refused(replace(plain, parameters={"model.norm.weight": torch.ones(24)}), parameters)
    assert "9.weight" in refused(
        replace(plain, token_rows={"9.weight": TokenRows(torch.arange(1), torch.ones(1, 24))}), parameters
    )
    assert "qkv.0.bias" in refused(replace(plain, parameters={"qkv.0.bias": torch.ones(16)}), parameters)
    assert "(40, 23)" in refused(replace(plain, parameters={"head.0.weight": torch.ones(40, 23)}), parameters)
    assert "(7,)" in refused(replace(plain, parameters={"qkv.1.bias": torch.ones(7)}), parameters)
    dora = bound_adapter(base, {"qkv.0": Kind("dora")}, 2, 0)
    assert "the base is needed" in refused(dora, None)
    both = replace(dora.modules["qkv.0"], lora_bias=torch.ones(16))
    assert "both" in refused(replace(dora, modules={"qkv.0": both}), parameters)
    short = replace(dora.modules["qkv.0"], magnitude=torch.ones(15))
    assert "(15,)" in refused(replace(dora, modules={"qkv.0": short}), parameters)


def test_factors_are_exact_where_the_expanded_norm_is_not() -> None:
    """B A that nearly cancels W: the difference of large squares would have no digits left."""
    weight = torch.randn(16, 24)
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    module = ModuleWeights(v, -(u * s) * (1 - 1e-3), 1.0, magnitude=torch.ones(16))
    factors = column_factors(weight.clone(), [(module, 0, 16)])
    expected = 1 / (weight.double() + module.b.double() @ module.a.double()).norm(dim=1)
    torch.testing.assert_close(factors.double(), expected, rtol=1e-2, atol=0)


def test_factors_are_kept_within_a_bound() -> None:
    cache, computed = FactorCache(capacity_bytes=100), []

    def get(digest: str, site: int) -> torch.Tensor:
        def compute() -> torch.Tensor:
            computed.append((digest, site))
            return torch.full((10,), float(site))

        return cache.get(digest, site, compute)

    assert torch.equal(get("a", 1), torch.full((10,), 1.0))
    assert get("a", 1) is get("a", 1)
    get("a", 2), get("b", 1)
    assert computed == [("a", 1), ("a", 2), ("b", 1)]
    assert cache.nbytes == 80
    get("a", 2), get("a", 1)
    assert computed[3:] == [("a", 1)]


@pytest.mark.parametrize(("kept_bytes", "reads"), [(CACHED_BYTES, 1), (0, 2)])
def test_factors_are_computed_once_a_packing_and_kept_for_the_next(kept_bytes: int, reads: int) -> None:
    class Weight:
        def __init__(self) -> None:
            self.reads = 0

        def dequantize(self) -> torch.Tensor:
            self.reads += 1
            return base.outputs(0, torch.eye(24)).T.contiguous()

    base = Base.make(SITES)
    weight = Weight()
    parameters = replace(base_parameters([weight, weight], base.biases), factors=FactorCache(kept_bytes))
    bound = bound_adapter(base, {"qkv.0": Kind("dora"), "qkv.2": Kind("dora")}, 2, 0)
    first, second = (pack_adapter(bound, SITES, torch.float32, CPU, parameters) for _ in range(2))
    assert weight.reads == reads
    assert torch.equal(first.sites[0][1].b_t, second.sites[0][1].b_t)
