#!/bin/sh
# Fills /opt/kvmesh, the virtual environment of an image, in two steps: a change of the code leaves the
# layer of the dependencies as it is.
#   install.sh dependencies EXTRA   what an extra of pyproject.toml needs; NIXL for those that move blocks
#   install.sh kvmesh               the gRPC stubs and kvmesh itself
set -eu
cd /src
tools=/opt/tools/bin
touch README.md # package metadata names it; its text is no reason to install everything anew

install() {
    "$tools/pip" --python /opt/kvmesh/bin/python install \
        --disable-pip-version-check --no-cache-dir --quiet "$@"
}

dependencies() {
    python3 -m venv /opt/tools
    "$tools/pip" install --disable-pip-version-check --no-cache-dir --quiet '.[stubs]'
    python3 -m venv --without-pip /opt/kvmesh
    install ".[$1]"
    [ "$1" = gateway ] || install --no-deps -r requirements-nixl.txt
    # What no service imports: NIXL's operators for torch, Triton's profiler, torch's own tests.
    for unused in nixl_ep_cu13 triton/backends/nvidia/lib/cupti* torch/test; do
        rm -rf /opt/kvmesh/lib/python3.*/site-packages/$unused
    done
}

kvmesh() {
    "$tools/python" -m grpc_tools.protoc -I. --python_out=. --grpc_python_out=. --pyi_out=. protos/*.proto
    install --no-deps --force-reinstall .
}

"$@"
