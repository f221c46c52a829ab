"""ServerService: what this server is."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import grpc.aio

from loraplex.server.config import ServerConfig
from loraplex.server.engine.limits import EngineLimits
from loraplex.server.models.loader import LoadedModel
from loraplex.v1 import server_pb2 as pb
from loraplex.v1 import server_pb2_grpc


def server_info(config: ServerConfig, model: LoadedModel, limits: EngineLimits) -> pb.GetServerInfoResponse:
    """Describe a server; nothing in it changes while the server lives."""
    return pb.GetServerInfoResponse(
        version=version("loraplex"),
        model=config.served_model_name or Path(config.model.model).name,
        architecture=model.architecture,
        base_fingerprint=model.base.fingerprint,
        quantization=model.quantization,
        dtype=str(model.dtype).removeprefix("torch."),
        device=model.device,
        max_model_len=limits.max_model_len,
        max_num_seqs=config.engine.max_num_seqs,
        kv_blocks=limits.num_blocks,
        kv_block_size=config.engine.block_size,
        vocab_size=model.vocab_size,
        eos_token_ids=model.eos_token_ids,
        target_modules=sorted({name.rsplit(".", 1)[-1] for name in model.base.modules}),
        adapter_device_memory_bytes=config.engine.adapter_device_memory,
        export_root=str(config.export_root or ""),
        model_path=str(model.path.resolve()),
    )


class ServerServicer(server_pb2_grpc.ServerServiceServicer):
    """Answers GetServerInfo with what was put together at start."""

    def __init__(self, info: pb.GetServerInfoResponse) -> None:
        self._info = info

    async def GetServerInfo(
        self,
        request: pb.GetServerInfoRequest,
        context: grpc.aio.ServicerContext[pb.GetServerInfoRequest, pb.GetServerInfoResponse],
    ) -> pb.GetServerInfoResponse:
        """Return the description."""
        return self._info
