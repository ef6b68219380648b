# CPU: docker build -t foveate .
# CUDA: docker build -t foveate --build-arg LOCK=cuda .
FROM python:3.11-slim
ARG LOCK=cpu
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/foveate
COPY locks locks
RUN pip install --no-cache-dir -r "locks/${LOCK}.txt"
COPY pyproject.toml README.md LICENSE ./
COPY src src
RUN pip install --no-cache-dir --no-deps .
WORKDIR /work
ENTRYPOINT ["foveate"]
CMD ["--help"]
