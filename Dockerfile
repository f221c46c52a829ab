# syntax=docker/dockerfile:1

# The default has what a GPU container needs from the driver's side; cuBLAS, cuDNN and the rest come with torch's own
# packages. Without a GPU: --build-arg BASE_IMAGE=ubuntu:24.04 --build-arg TORCH_INDEX=<an index of CPU-only builds>.
# Any Debian or Ubuntu image with Python 3.11 or newer (its own or the distribution's) will do.
ARG BASE_IMAGE=nvidia/cuda:13.0.2-base-ubuntu24.04

FROM ${BASE_IMAGE} AS base
# The compiler and the headers stay: Triton builds the launchers of its kernels when they first run.
# hadolint ignore=DL3008
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        ca-certificates gcc libc6-dev python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

FROM base AS build
ARG TORCH_INDEX=""
WORKDIR /src
RUN python3 -m venv /opt/loraplex
# torch is by far the largest layer and changes least, so it does not wait for the sources.
COPY constraints.txt ./
RUN /opt/loraplex/bin/pip install --no-cache-dir -c constraints.txt \
        ${TORCH_INDEX:+--index-url "${TORCH_INDEX}"} torch
COPY pyproject.toml LICENSE README.md* ./
COPY server server
COPY client client
COPY protos protos
COPY adapters adapters
COPY bench bench
RUN /opt/loraplex/bin/pip install --no-cache-dir -c constraints.txt '.[server]'

FROM base
# Made before VOLUME, so that fresh named volumes belong to the user who writes to them.
RUN groupadd --gid 10001 loraplex \
    && useradd --uid 10001 --gid loraplex --create-home loraplex \
    && mkdir /models /adapters /exports /state /cache \
    && chown loraplex:loraplex /models /adapters /exports /state /cache
COPY --from=build /opt/loraplex /opt/loraplex
COPY scripts/healthcheck.py /opt/loraplex/healthcheck.py
ENV PATH=/opt/loraplex/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    LORAPLEX_CACHE=/cache/loraplex \
    HF_HOME=/cache/huggingface \
    NUMBA_CACHE_DIR=/cache/numba \
    TRITON_CACHE_DIR=/cache/triton
USER 10001:10001
WORKDIR /home/loraplex
# /models and /adapters are read; /exports takes merged models; /state keeps registered adapters over restarts; /cache
# holds hub downloads and compiled kernels. No weights are in the image.
VOLUME ["/models", "/adapters", "/exports", "/state", "/cache"]
# gRPC and metrics.
EXPOSE 50051 8000
# A large base model takes minutes to load; until then the port answers nothing.
HEALTHCHECK --interval=10s --timeout=5s --start-period=10m --retries=3 \
    CMD ["python", "/opt/loraplex/healthcheck.py", "127.0.0.1:50051"]
# Inside a container only 0.0.0.0 can be published. `docker run IMAGE --model /models/NAME ...` appends to this;
# other commands: `docker run --entrypoint loraplex IMAGE advise ...`.
ENTRYPOINT ["loraplex", "serve", "--host", "0.0.0.0", "--metrics-host", "0.0.0.0", \
            "--adapters", "/adapters", "--export-root", "/exports", "--state-dir", "/state"]
CMD ["--help"]
