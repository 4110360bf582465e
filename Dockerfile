# CPU:     docker build -t mamba-ct-report .
# NVIDIA:  docker build -t mamba-ct-report --build-arg TORCH=cu130 .
# Run:     docker run --rm -v /data/ct:/data -v "$PWD/outputs:/app/outputs" mamba-ct-report scripts/report_folder.py /data outputs/reports
#          (NVIDIA: docker run --gpus all ...)
ARG PYTHON=3.11
FROM python:${PYTHON}-slim-bookworm

# The index of PyTorch's wheels: cpu, or cu130 for NVIDIA cards.
ARG TORCH=cpu

ENV PYTHONUTF8=1 \
    PYTHONUNBUFFERED=1 \
    PIP_NO_CACHE_DIR=1 \
    MAMBA_CT_PYTHON=current \
    HF_HOME=/app/outputs/huggingface

# Triton compiles a launcher with a C compiler; nothing else needs one.
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /app

# Requirements first: a change of the code does not install them again.
COPY requirements.txt ./
RUN pip install torch==2.13.0 --index-url https://download.pytorch.org/whl/${TORCH} \
    && pip install -r requirements.txt

COPY . .

# Files of a mounted folder are written by this user: docker run --user "$(id -u)" where that is not yours.
RUN useradd --create-home --uid 1000 reader && mkdir -p outputs && chown reader outputs
USER reader
# A user whom the image does not know has no home folder to keep compiled kernels in.
ENV NUMBA_CACHE_DIR=/tmp/numba TRITON_CACHE_DIR=/tmp/triton

VOLUME ["/app/outputs"]
EXPOSE 8350

ENTRYPOINT ["python"]
CMD ["scripts/doctor.py"]
