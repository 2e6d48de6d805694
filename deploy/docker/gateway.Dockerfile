# The gateway: public API, tokenizer, routing, streams. No torch.
# Build it from the repository's root: docker build -f deploy/docker/gateway.Dockerfile .
ARG BASE=python:3.11.14-slim-bookworm

FROM ${BASE} AS build
# A package mirror instead of pip's own default, and its host where it has no TLS.
ARG PIP_INDEX_URL=
ARG PIP_EXTRA_INDEX_URL=
ARG PIP_TRUSTED_HOST=
WORKDIR /src
COPY pyproject.toml LICENSE requirements-nixl.txt ./
COPY deploy/docker/install.sh deploy/docker/
RUN sh deploy/docker/install.sh dependencies gateway
COPY . .
RUN sh deploy/docker/install.sh kvmesh

FROM ${BASE}
RUN useradd --uid 10001 --no-create-home --home-dir /tmp kvmesh
COPY --from=build /opt/kvmesh /opt/kvmesh
ENV PATH=/opt/kvmesh/bin:$PATH PYTHONUNBUFFERED=1 KVMESH_HOST=0.0.0.0 KVMESH_PORT=50051 \
    KVMESH_ADMIN_PORT=50052 KVMESH_HTTP_PORT=50053 TOKENIZERS_PARALLELISM=false
USER 10001:10001
EXPOSE 50051 50052 50053
HEALTHCHECK --interval=5s --timeout=4s --start-period=300s --retries=3 \
    CMD ["kvmesh", "health"]
ENTRYPOINT ["python", "-m", "services.gateway"]
