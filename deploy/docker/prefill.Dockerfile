# The prefill service: computes prompts, writes their blocks to the kvstore.
# Build it from the repository's root: docker build -f deploy/docker/prefill.Dockerfile .
ARG BASE=python:3.11.14-slim-bookworm

FROM ${BASE} AS build
# A package mirror instead of pip's own default, and its host where it has no TLS.
ARG PIP_INDEX_URL=
ARG PIP_EXTRA_INDEX_URL=
ARG PIP_TRUSTED_HOST=
WORKDIR /src
COPY pyproject.toml LICENSE requirements-nixl.txt ./
COPY deploy/docker/install.sh deploy/docker/
RUN sh deploy/docker/install.sh dependencies worker
COPY . .
RUN sh deploy/docker/install.sh kvmesh

FROM ${BASE} AS cpu
RUN useradd --uid 10001 --no-create-home --home-dir /tmp kvmesh
COPY --from=build /opt/kvmesh /opt/kvmesh
ENV PATH=/opt/kvmesh/bin:$PATH PYTHONUNBUFFERED=1 KVMESH_HOST=0.0.0.0 KVMESH_PORT=50051
USER 10001:10001
EXPOSE 50051
HEALTHCHECK --interval=5s --timeout=4s --start-period=300s --retries=3 \
    CMD ["kvmesh", "health"]
ENTRYPOINT ["python", "-m", "services.prefill"]

# Triton compiles the launchers of its kernels where they run; what it has compiled is kept in a volume.
FROM cpu AS gpu
USER root
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/* \
    && install -d -o kvmesh -g kvmesh /var/cache/kvmesh
ENV KVMESH_DEVICE=cuda TRITON_CACHE_DIR=/var/cache/kvmesh
USER 10001:10001
VOLUME /var/cache/kvmesh
