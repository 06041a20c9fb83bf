# The CUDA version is the one that torch 2.13.0 is built for. The devel image is needed because DeepSpeed compiles
# operators at first use. Ubuntu 24.04 provides Python 3.12, for which megatron-core 0.16.1 has a wheel.
FROM nvidia/cuda:13.0.2-devel-ubuntu24.04

# Packages are not pinned: security updates matter more here than a reproducible image.
# hadolint ignore=DL3008
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
        g++ git iproute2 numactl openmpi-bin openssh-client openssh-server pdsh python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

RUN useradd --uid 10001 --create-home --shell /bin/bash trainer \
    && install --directory --owner trainer --group trainer /opt/hypermoe-ds
USER 10001:10001
WORKDIR /opt/hypermoe-ds

# Copy the files that determine the installation first, so that other edits do not reinstall torch.
COPY --chown=10001:10001 pyproject.toml constraints.txt README.md ./
COPY --chown=10001:10001 launch/setup.sh launch/
COPY --chown=10001:10001 hypermoe_ds/__init__.py hypermoe_ds/
RUN PIP_NO_CACHE_DIR=1 bash launch/setup.sh mpi gpu
ENV PATH="/opt/hypermoe-ds/.venv/bin:$PATH"

COPY --chown=10001:10001 . .
CMD ["bash"]
