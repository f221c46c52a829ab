"""Memory on huge pages, against what the system says of it."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch

from loraplex.server.native.pages import HUGE_PAGE_BYTES, SLAB_BYTES, copy_to_huge_pages, zeros_on_huge_pages

SMAPS = Path("/proc/self/smaps")
ON_LINUX = pytest.mark.skipif(not SMAPS.exists(), reason="asks Linux about its memory")
WITH_HUGE_PAGES = pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="this kernel has no huge pages"
)


def mapping_flags(address: int) -> tuple[int, list[str]] | None:
    """Return the bytes and the flags of the mapping that begins at `address`, None where none does."""
    size = 0
    found = False
    for line in SMAPS.read_text().splitlines():
        first, *rest = line.split()
        if "-" in first and ":" not in first:
            start, end = (int(part, 16) for part in first.split("-"))
            found, size = start == address, end - start
        elif found and first == "VmFlags:":
            return size, rest
    return None


@pytest.mark.parametrize("nbytes", [0, 5, HUGE_PAGE_BYTES - 1, HUGE_PAGE_BYTES, 2 * HUGE_PAGE_BYTES + 77])
def test_it_is_zeros_that_can_be_written(nbytes: int) -> None:
    memory = zeros_on_huge_pages(nbytes)
    assert memory.dtype is torch.uint8
    assert memory.shape == (nbytes,)
    assert not memory.any()
    memory.fill_(3)
    assert memory.sum(dtype=torch.int64) == 3 * nbytes


@ON_LINUX
@WITH_HUGE_PAGES
def test_whole_huge_pages_are_asked_for_and_no_more() -> None:
    memory = zeros_on_huge_pages(2 * HUGE_PAGE_BYTES + 77)
    assert memory.data_ptr() % HUGE_PAGE_BYTES == 0
    mapping = mapping_flags(memory.data_ptr())
    assert mapping is not None
    assert mapping[0] == 2 * HUGE_PAGE_BYTES
    assert "hg" in mapping[1]


@ON_LINUX
@WITH_HUGE_PAGES
def test_the_memory_goes_back_with_the_last_view_of_it() -> None:
    view = zeros_on_huge_pages(4 * HUGE_PAGE_BYTES)[HUGE_PAGE_BYTES:].view(torch.float32)
    start = view.data_ptr() - HUGE_PAGE_BYTES
    view.fill_(1)
    assert mapping_flags(start) is not None
    del view
    assert mapping_flags(start) is None


def test_copies_share_slabs_and_nothing_else() -> None:
    tensors = [torch.randn(size, 3) for size in (1, 1000, 5)] + [torch.arange(7), torch.randn(6, 5).t()]
    tensors.append(torch.zeros(SLAB_BYTES + 1, dtype=torch.uint8))
    copies = [copy_to_huge_pages(tensor) for tensor in tensors]
    for tensor, copy in zip(tensors, copies, strict=True):
        assert torch.equal(copy, tensor)
        assert copy.is_contiguous()
        assert copy.data_ptr() % 64 == 0
    spans = sorted((copy.data_ptr(), copy.data_ptr() + copy.nbytes) for copy in copies)
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))
