# Three images; the last is what `docker build .` makes.
#   docker build --target serve-cpu --tag lookalike-serve-cpu .     search and serve on CPUs; also index, embed, evaluate
#   docker build --target serve-gpu --tag lookalike-serve-gpu .     the same with the CUDA builds of torch and faiss
#   docker build --target train     --tag lookalike-train     .     training, with DeepSpeed and a C compiler for Triton
# docs/operations.md says how to run them.
FROM python:3.11-slim AS build
# An image for CPUs should not carry CUDA: give the package index of torch's CPU builds here.
ARG PIP_EXTRA_INDEX_URL=""
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY constraints constraints
COPY lookalike lookalike
COPY data_pipelines data_pipelines
COPY training training
COPY indexing indexing
COPY evaluation evaluation
COPY serving serving
COPY demo demo
# Without pip: an image that serves installs nothing.
RUN python -m venv --without-pip /opt/lookalike

FROM build AS build-serve-cpu
RUN pip --python /opt/lookalike/bin/python install --constraint constraints/ci.txt ".[cpu,fast,tracing]"

FROM build AS build-serve-gpu
RUN pip --python /opt/lookalike/bin/python install --constraint constraints/ci.txt ".[gpu,fast,tracing]"

FROM build AS build-train
RUN pip --python /opt/lookalike/bin/python install --constraint constraints/ci.txt \
    ".[gpu,fast,deepspeed,tensorboard,http,s3,gs]"

FROM python:3.11-slim AS run
RUN useradd --create-home --uid 10001 lookalike && install --directory --owner=lookalike /data
ENV PATH=/opt/lookalike/bin:$PATH PYTHONUNBUFFERED=1
WORKDIR /data
ENTRYPOINT ["lookalike"]

FROM run AS train
# Triton compiles launchers of its kernels when they are first used. Versions are the distribution's.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends gcc libc6-dev \
 && rm -rf /var/lib/apt/lists/*
COPY --from=build-train /opt/lookalike /opt/lookalike
COPY configs /etc/lookalike/configs
# By number, so that Kubernetes can tell that it is not root.
USER 10001
CMD ["train", "--help"]

FROM run AS serve
COPY deploy/serve.yaml /etc/lookalike/serve.yaml
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/readyz', timeout=3)"]
USER 10001
CMD ["serve", "--settings", "/etc/lookalike/serve.yaml"]

FROM serve AS serve-gpu
COPY --from=build-serve-gpu /opt/lookalike /opt/lookalike

FROM serve AS serve-cpu
COPY --from=build-serve-cpu /opt/lookalike /opt/lookalike
