# CPU: docker build -t foveate .
# CUDA: docker build -t foveate --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu128 .
FROM python:3.11-slim
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/foveate
COPY constraints.txt pyproject.toml README.md LICENSE ./
COPY src src
RUN pip install --no-cache-dir torch==2.13.0 --index-url "${TORCH_INDEX}" \
    && pip install --no-cache-dir -c constraints.txt '.[all]'
WORKDIR /work
ENTRYPOINT ["foveate"]
CMD ["--help"]
