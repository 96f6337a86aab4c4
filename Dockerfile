# An image that runs `aezoo`, as a user without rights. docs/docker.md says how it is built and what was tried.
#
#     docker build -t aezoo .
#     docker run --rm -v "$PWD/runs:/data/runs" aezoo fit -c vae
#
# a Python of 3.11 or newer, as python3, with its module venv
ARG BASE=python:3.13-slim

FROM ${BASE} AS build
# pip reads this variable. Left out, torch comes with CUDA; with the address of torch's CPU builds, without
ARG PIP_EXTRA_INDEX_URL
ARG EXTRAS=codec,hub,onnx
COPY pyproject.toml README.md LICENSE /src/
COPY aezoo /src/aezoo
COPY benchmarks /src/benchmarks
COPY docs /src/docs
COPY recipes /src/recipes
RUN python3 -m venv /venv && /venv/bin/pip install --no-cache-dir "/src[${EXTRAS}]"

FROM ${BASE}
# torch.compile builds kernels with a C++ compiler on a CPU, and its launchers of them with a C compiler on a GPU
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build /venv /venv
RUN useradd --create-home --uid 1000 aezoo \
    && mkdir -p /data/runs \
    && chown -R aezoo /data
ENV PATH=/venv/bin:$PATH
USER aezoo
WORKDIR /data
ENTRYPOINT ["aezoo"]
CMD ["--help"]
