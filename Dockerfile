# A machine that serves: this package's runtime and command line, without diffusers, onnx, or anything else that compiles.
#
# Unverified: this file has never been built, and nothing in it has run on a GPU.
#
#     docker build -t edit-compile .
#     docker run --rm --gpus all -v "$PWD/flux.edit:/flux.edit" edit-compile build /flux.edit --engine tensorrt
#     docker run --rm --gpus all -v "$PWD/flux.edit:/flux.edit" edit-compile verify /flux.edit --engine tensorrt --tolerance 0.02
#
# BASE: any Linux image with Python 3.11 or later, or with apt to get it from. torch's wheels bring CUDA's libraries, and the
# host's driver comes in through NVIDIA's container toolkit. NVIDIA's TensorRT images have TensorRT in the system's Python,
# which the environment below sees: then say --build-arg TENSORRT= so that it is not installed a second time.
# ENGINES: extras of this package to install beside the command line, with commas: gpu (ONNX Runtime on CUDA), tensorrt-rtx,
# device-dispatch (decisions on the GPU), or none.
# TOOLS: more packages of the base image; engine "inductor" compiles at load and needs "gcc python3-dev".
ARG BASE=nvidia/cuda:13.0.1-runtime-ubuntu24.04
FROM ${BASE}

ARG TENSORRT="tensorrt>=11"
ARG ENGINES=""
ARG TOOLS=""

RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-venv ${TOOLS} \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv --system-site-packages /opt/edit-compile
ENV PATH=/opt/edit-compile/bin:$PATH

WORKDIR /src
COPY constraints.txt pyproject.toml README.md LICENSE ./
# torch first and alone: the pinned one, whatever the other packages would take
RUN pip install --no-cache-dir "$(grep '^torch==' constraints.txt)" \
    && if [ -n "${TENSORRT}" ]; then pip install --no-cache-dir "${TENSORRT}"; fi
COPY runtime runtime
COPY passes passes
COPY edit_compile edit_compile
RUN pip install --no-cache-dir -c constraints.txt ".[cli${ENGINES:+,$ENGINES}]"

WORKDIR /
ENTRYPOINT ["edit-compile"]
