"""The LoRA operator for CPUs: a compiled kernel for short segments, torch's matrix products for long ones."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from loraplex.server.lora.ops import cpu_kernel as kernel
from loraplex.server.lora.ops.reference import add_segment
from loraplex.server.lora.segments import Segment
from loraplex.server.lora.weights import PackedAdapter

MAX_KERNEL_TOKENS = 32
_DTYPES = (torch.float32, torch.bfloat16)
_CALL = struct.Struct(f"{kernel.CALL_FIELDS}q{8 * (kernel.STEP_FIELDS - kernel.CALL_FIELDS)}x")


@dataclass(frozen=True)
class _Prepared:
    """One step's segments, as tables for the kernel. `kept` are the arrays that `arguments` points into."""

    arguments: npt.NDArray[np.int64]
    address: int
    kept: tuple[npt.NDArray[Any], ...]
    units: int
    threads: int
    long: tuple[tuple[Segment, PackedAdapter], ...]
    end: int
    extents: tuple[tuple[int, int], ...]
    adapters: tuple[PackedAdapter, ...]


class CpuLoraOps:
    """Implements `LoraOps`; see there for semantics and shapes. Weights are float32 or bfloat16, one kind at a time."""

    def __init__(self) -> None:
        pass

    def prepare(self, segments: Sequence[Segment], slots: Mapping[int, PackedAdapter]) -> _Prepared:
        adapters = [(s, slots[s.slot]) for s in segments]
        used = [a for a in {id(a): a for _, a in adapters}.values()]
        short = [(s, a) for s, a in adapters if s.end - s.start <= MAX_KERNEL_TOKENS]
        long = tuple((s, a) for s, a in adapters if s.end - s.start > MAX_KERNEL_TOKENS)
        short.sort(key=lambda e: -e[1].rank * (e[0].end - e[0].start))
        threads = torch.get_num_threads()
        slices = max((a.table.shape[1] for a in used), default=0)
        units = len(short)*slices
        parts = 0 if len(short) >= 2*threads or threads==1 else 2*threads
        rows=[]
        off=0
        for s,a in short:
            n=s.end-s.start; m=a.table.shape[1]
            rows.append((s.start,n,a.table.ctypes.data,m,off,n*a.rank)); off+=n*a.rank*m
        seg=np.array(rows,dtype=np.int64).reshape(-1,6)
        scales=np.array([s.scale for s,_ in short],dtype=np.float32)
        hidden=np.empty(max(off,1),np.float32)
        sums=np.empty(kernel.SUMS_PER_THREAD*threads,np.float32)
        args=np.zeros(kernel.NUM_ARGUMENTS,np.int64)
        dt=next((p.a.dtype for st in used[0].sites for p in st),torch.float32) if used else torch.float32
        self._kernel=kernel.lora_add_kernel(dt)
        args[40:47]=(seg.ctypes.data,scales.ctypes.data,len(short),slices,parts,hidden.ctypes.data,sums.ctypes.data)
        ext = np.maximum.reduce([a.extents for a in used]).tolist() if used else []
        return _Prepared(args,args.ctypes.data,(seg,scales,hidden,sums),len(short),threads,long,max((s.end for s in segments),default=0),ext,tuple(used))

    def add(self, y: torch.Tensor, x: torch.Tensor, site: int, prepared: Any) -> None:
        p = prepared
        if not p.adapters: return
        k, width = p.extents[site]
        if not k: return
        if p.units:
            xf = x if x.dtype is torch.float32 else x.float()
            a=p.arguments
            _CALL.pack_into(a,0,y.data_ptr(),y.stride(0),y.dtype is torch.bfloat16,xf.data_ptr(),xf.stride(0),k,site)
            self._kernel(p.address,p.threads)
        for s,ad in p.long: add_segment(y,x,s,ad,site)
