"""Attention on CPUs: a compiled kernel for decode rows and short chunks, matrix products for longer chunks."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from loraplex.server.attention import cpu_kernel as kernel
from loraplex.server.attention.interface import AttentionParams, check_shapes
from loraplex.server.attention.reference import gather_context
from loraplex.server.engine.batch import Batch
from loraplex.server.engine.kv_cache import LayerKVCache

MAX_KERNEL_QUERIES = 16
_CALL = struct.Struct("14q2d56q")


@dataclass(frozen=True)
class _Plan:
    arguments: npt.NDArray[np.int64]
    address: int
    kept: tuple[Any, ...]
    threads: int
    long_rows: tuple[tuple[int, int, int, int], ...]


class CpuAttention:
    def __init__(self) -> None:
        self._plan: tuple[Batch | None, _Plan | None] = (None, None)

    def __call__(self, q, k, v, cache, batch, params):
        check_shapes(q, k, v, cache, batch)
        b, plan = self._plan
        if b is not batch:
            plan = _make_plan(q, cache, batch)
            self._plan = (batch, plan)
        out = torch.empty(q.shape, dtype=q.dtype)
        T, H, D = q.shape
        _, KV, BS, _ = cache.k.shape
        _CALL.pack_into(plan.arguments, 0, q.data_ptr(), q.stride(0), k.data_ptr(), k.stride(0), v.data_ptr(), v.stride(0), out.data_ptr(),
          cache.k.data_ptr(), cache.v.data_ptr(), H, KV, D, BS, params.window or 0, params.scale, params.softcap or 0.0, *([0]*56))
        kernel.attention_kernel(q.dtype, cache.k.dtype)(plan.address, plan.threads)
        for row, start, n, ctx in plan.long_rows:
            out[start:start+n] = attend_long(q[start:start+n], cache, batch.block_tables[row], ctx, params).to(q.dtype)
        return out

def attend_long(q, cache, table, context, params):
    keys, values = gather_context(cache, table, context)
    n=q.shape[0]
    mask=None
    causal = n==context and params.window is None
    if not causal:
        own=torch.arange(context-n,context)[:,None]; seen=torch.arange(context)[None,:]
        mask = seen<=own
        if params.window is not None: mask&= seen>own-params.window
    return torch.nn.functional.scaled_dot_product_attention(q.float().transpose(0,1)[None], keys[None], values[None], attn_mask=mask, is_causal=causal, scale=params.scale, enable_gqa=True)[0].transpose(0,1)

def _make_plan(q, cache, batch):
    T,H,D=q.shape; KV=cache.k.shape[1]
    queries=[];items=[];long=[]
    start=0
    for row,(n,c) in enumerate(zip(batch.query_lens_cpu,batch.context_lens_cpu,strict=True)):
        if n<=MAX_KERNEL_QUERIES:
            for i in range(n):
                ctx=c-n+1+i
                parts=-(-ctx//kernel.PART)
                queries.append((start+i,ctx,row,parts,len(items)))
                items+=[(len(queries)-1,j) for j in range(parts)]
        else: long.append((row,start,n,c))
        start+=n
    qa=np.array(queries,dtype=np.int64).reshape(-1,5); ia=np.array(items,dtype=np.int64).reshape(-1,2)
    threads=torch.get_num_threads()
    group=H//KV
    sf=group*(2*D+kernel.PART)+cache.k.shape[2]*D
    scratch=np.empty(threads*sf,np.float32)
    partials=np.empty(max(1,len(items)*H*(D+2)),np.float32)
    a=np.zeros(kernel.NUM_ARGUMENTS,np.int64)
    slots=batch.slot_mapping.contiguous(); tables=batch.block_tables.contiguous()
    a[72:85]=(T,slots.data_ptr(),len(queries),qa.ctypes.data,len(items),ia.ctypes.data,tables.data_ptr(),tables.stride(0),partials.ctypes.data,scratch.ctypes.data,sf,any(x[3]>1 for x in queries),cache.k.itemsize)
    return _Plan(a,a.ctypes.data,(qa,ia,scratch,partials,slots,tables),threads,tuple(long))
