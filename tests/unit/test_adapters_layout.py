"""Adapters of a known layout: the same as read in full, and never with weights that the digest does not say."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from loraplex.adapters.binding import BoundAdapter, bind
from loraplex.adapters.errors import AdapterFormatError, CorruptStoreError
from loraplex.adapters.folder import WEIGHTS_FILE
from loraplex.adapters.formats import read_adapter
from loraplex.adapters.intake import Intake
from loraplex.adapters.registry import AdapterRegistry
from tests.adapter_factory import tensors, tiny_base, write_adapter


@pytest.fixture
def registry(tmp_path: Path) -> AdapterRegistry:
    (tmp_path / "source").mkdir()
    return AdapterRegistry(tmp_path / "state", tiny_base(), (tmp_path / "source",))


def register(registry: AdapterRegistry, folder: Path) -> str:
    return registry.register(folder.name, str(folder)).record.digest


def weights_of(registry: AdapterRegistry, digest: str) -> Path:
    return registry.folder(digest) / WEIGHTS_FILE


def assert_equal(found: BoundAdapter, expected: BoundAdapter) -> None:
    assert (found.digest, found.traits, found.chat_template) == (
        expected.digest,
        expected.traits,
        expected.chat_template,
    )
    assert found.modules.keys() == expected.modules.keys()
    for name, module in expected.modules.items():
        assert found.modules[name].scaling == module.scaling
        assert torch.equal(found.modules[name].a, module.a)
        assert torch.equal(found.modules[name].b, module.b)
    assert not any((found.embedding, found.parameters, found.token_rows))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_a_layout_reads_is_what_binding_gives(
    registry: AdapterRegistry, tmp_path: Path, dtype: torch.dtype
) -> None:
    folders = []
    for seed in range(3):
        weights = {name: tensor.to(dtype) for name, tensor in tensors(tiny_base(), seed=seed).items()}
        folders.append(write_adapter(tmp_path / "source" / f"a{seed}", weights=weights, template="T {{ x }}"))
    digests = [register(registry, folder) for folder in folders]
    loaded = [registry.load(digest) for digest in digests]
    again = registry.load(digests[0])
    assert loaded[0].layout is not None
    assert len({id(bound.layout) for bound in (*loaded, again)}) == 1
    for bound, folder in zip((*loaded, again), (*folders, folders[0]), strict=True):
        assert_equal(bound, bind(read_adapter(folder), tiny_base()))


def test_the_same_shapes_under_another_config_are_another_layout(registry: AdapterRegistry, tmp_path: Path) -> None:
    weights = tensors(tiny_base())
    folders = [
        write_adapter(tmp_path / "source" / f"alpha{alpha}", weights=weights, lora_alpha=alpha) for alpha in (4, 8)
    ]
    templated = write_adapter(tmp_path / "source" / "templated", weights=weights, lora_alpha=4, template="T")
    for folder in (*folders, templated, *folders):
        assert_equal(registry.load(register(registry, folder)), bind(read_adapter(folder), tiny_base()))


def test_tensors_in_another_order_of_the_file_are_found(registry: AdapterRegistry, tmp_path: Path) -> None:
    """The library sorts by type first, so that one float32 tensor moves to the front."""
    for seed in range(2):
        weights = {name: tensor.half() for name, tensor in tensors(tiny_base(), seed=seed).items()}
        last = sorted(weights)[-1]
        weights[last] = weights[last].float()
        folder = write_adapter(tmp_path / "source" / f"a{seed}", weights=weights)
        digest = register(registry, folder)
        for _ in range(2):
            assert_equal(registry.load(digest), bind(read_adapter(folder), tiny_base()))


def known(registry: AdapterRegistry, tmp_path: Path) -> tuple[str, str]:
    """Register and load two adapters of one layout."""
    digests = [register(registry, write_adapter(tmp_path / "source" / f"a{seed}", seed=seed)) for seed in range(2)]
    for digest in digests:
        registry.load(digest)
    return digests[0], digests[1]


@pytest.mark.parametrize("at", ["first", "last"])
def test_a_changed_number_is_noticed_although_size_and_time_are_the_same(
    registry: AdapterRegistry, tmp_path: Path, at: str
) -> None:
    digest, other = known(registry, tmp_path)
    path = weights_of(registry, digest)
    content, times = bytearray(path.read_bytes()), path.stat()
    position = 8 + int.from_bytes(content[:8], "little") if at == "first" else len(content) - 1
    content[position] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(CorruptStoreError, match="have changed"):
        registry.load(digest)
    registry.load(other)


def test_another_adapters_weights_are_noticed(registry: AdapterRegistry, tmp_path: Path) -> None:
    digest, other = known(registry, tmp_path)
    weights_of(registry, digest).write_bytes(weights_of(registry, other).read_bytes())
    with pytest.raises(CorruptStoreError, match="have changed"):
        registry.load(digest)


def test_swapped_tensors_and_a_changed_config_are_noticed(registry: AdapterRegistry, tmp_path: Path) -> None:
    digest, other = known(registry, tmp_path)
    path = weights_of(registry, digest)
    found = load_file(path)
    first, second = (f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_A.weight" for layer in (0, 1))
    found[first], found[second] = found[second].clone(), found[first].clone()
    save_file(found, path, metadata={"format": "pt"})
    with pytest.raises(CorruptStoreError, match="have changed"):
        registry.load(digest)
    config = registry.folder(other) / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 8', '"lora_alpha": 9'))
    with pytest.raises(CorruptStoreError, match="have changed"):
        registry.load(other)


def test_registering_by_a_known_layout_checks_and_writes_down_the_same(
    registry: AdapterRegistry, tmp_path: Path
) -> None:
    first = registry.register("first", str(write_adapter(tmp_path / "source" / "first", seed=1))).record
    folder = write_adapter(tmp_path / "source" / "second", seed=2)
    second = registry.register("second", str(folder)).record
    assert second.digest == read_adapter(folder).digest != first.digest
    assert (second.rank, second.target_modules, second.size_bytes, second.traits) == (
        first.rank,
        first.target_modules,
        first.size_bytes,
        first.traits,
    )
    weights = tensors(tiny_base(), seed=3)
    bad = sorted(weights)[-1]
    weights[bad][0, 0] = float("nan")
    with pytest.raises(AdapterFormatError, match="NaN") as caught:
        registry.register("third", str(write_adapter(tmp_path / "source" / "third", weights=weights)))
    assert [violation.field for violation in caught.value.violations] == [bad]


def test_a_config_that_fits_the_base_no_more_is_damage_and_mended_by_registering_again(
    registry: AdapterRegistry, tmp_path: Path
) -> None:
    folder = write_adapter(tmp_path / "source" / "a")
    digest = register(registry, folder)
    config = registry.folder(digest) / "adapter_config.json"
    config.write_text(config.read_text().replace('"v_proj"', '"k_proj"'))
    with pytest.raises(CorruptStoreError, match="have changed"):
        registry.load(digest)
    assert register(registry, folder) == digest
    assert registry.load(digest).digest == digest


@pytest.mark.parametrize("damage", ["cut", "empty", "gone"])
def test_a_damaged_file_is_unreadable_not_another_layout(
    registry: AdapterRegistry, tmp_path: Path, damage: str
) -> None:
    digest, _ = known(registry, tmp_path)
    path = weights_of(registry, digest)
    content = path.read_bytes()
    path.unlink()
    if damage != "gone":
        path.write_bytes(content[:-4] if damage == "cut" else b"")
    with pytest.raises(CorruptStoreError):
        registry.load(digest)


def test_what_is_no_plain_lora_has_no_layout(registry: AdapterRegistry, tmp_path: Path) -> None:
    weights = tensors(tiny_base())
    magnitudes = {
        name.replace("lora_B.weight", "lora_magnitude_vector"): torch.ones(len(tensor))
        for name, tensor in weights.items()
        if "lora_B" in name
    }
    folder = write_adapter(tmp_path / "source" / "dora", weights=weights | magnitudes, use_dora=True)
    digest = register(registry, folder)
    for _ in range(2):
        bound = registry.load(digest)
        assert bound.layout is None
        assert all(module.magnitude is not None for module in bound.modules.values())


def test_only_the_latest_layouts_are_kept(
    registry: AdapterRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loraplex.adapters.layout.KEPT_LAYOUTS", 2)
    digests = [
        register(registry, write_adapter(tmp_path / "source" / f"alpha{alpha}", lora_alpha=alpha))
        for alpha in range(1, 5)
    ]
    for digest in digests:
        registry.load(digest)
    intake: Intake = registry.stock._intake
    assert len(intake._layouts._known) == 2
    assert registry.load(digests[0]).modules
