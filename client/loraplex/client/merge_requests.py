"""Builds the call that merges from plain Python values. Sends nothing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Unpack

from loraplex.client import responses
from loraplex.client.calls import Call
from loraplex.client.merging import MergeBase, MergeKeywords, MergeMethod, MergeProgress
from loraplex.client.request_fields import field_named
from loraplex.v1 import export_pb2

_MERGE_BASES = {
    MergeBase.FULL_PRECISION: export_pb2.MERGE_BASE_FULL_PRECISION,
    MergeBase.DEQUANTIZED: export_pb2.MERGE_BASE_DEQUANTIZED,
}

_MERGE_METHODS = {
    MergeMethod.LINEAR: export_pb2.MERGE_METHOD_LINEAR,
    MergeMethod.TIES: export_pb2.MERGE_METHOD_TIES,
    MergeMethod.DARE_LINEAR: export_pb2.MERGE_METHOD_DARE_LINEAR,
    MergeMethod.DARE_TIES: export_pb2.MERGE_METHOD_DARE_TIES,
}


def merge_adapter(
    adapter: str | Mapping[str, float], output: str | Path, **options: Unpack[MergeKeywords]
) -> Call[MergeProgress]:
    """Return the call that merges, streaming its progress.

    Raises:
        InvalidRequestError: for a value that does not fit its field.
        TypeError: for a keyword that is none of `MergeKeywords`.
    """
    if unknown := set(options) - set(MergeKeywords.__annotations__):
        raise TypeError(f"no option of a merge: {', '.join(sorted(unknown))}")
    request = export_pb2.MergeAdapterRequest(output=str(output))
    with field_named("base"):
        request.base = _MERGE_BASES[MergeBase(options.pop("base", MergeBase.FULL_PRECISION))]
    with field_named("method"):
        request.method = _MERGE_METHODS[MergeMethod(options.pop("method", MergeMethod.LINEAR))]
    request.prompts.extend(options.pop("prompts", ()))
    if isinstance(adapter, str):
        request.adapter = adapter
    else:
        for name, weight in adapter.items():
            with field_named("adapters.weight"):
                request.adapters.add(adapter=name, weight=weight)
    for name, value in options.items():
        if value is not None:
            with field_named(name):
                setattr(request, name, value)
    header = adapter if isinstance(adapter, str) else ""
    return Call(lambda stubs: stubs.export.MergeAdapter, request, responses.merge_progress, header)
