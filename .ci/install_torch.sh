#!/bin/sh
# Installs torch for this machine: sh .ci/install_torch.sh PYTHON, with TORCH_VERSION and TORCH_INDEX_URL set.
# Linux wheels of torch on PyPI bring gigabytes of CUDA libraries, so a machine without an NVIDIA GPU gets the CPU build.
set -eu
python=$1

if "$python" -c "import sys, torch; sys.exit(torch.__version__.split('+')[0] != '$TORCH_VERSION')" 2>/dev/null; then
    exit 0
fi
if [ "$(uname -s)" != Linux ] || command -v nvidia-smi >/dev/null 2>&1; then
    exec "$python" -m pip install "torch==$TORCH_VERSION"
fi

cpu_torch="torch==$TORCH_VERSION+cpu"
# pip's own sources first (a mirror or a wheel folder may have it), then PyTorch's index, without waiting long for it.
if "$python" -m pip install --quiet "$cpu_torch" 2>/dev/null; then
    exit 0
fi
if "$python" -m pip install --retries 0 --timeout 20 --index-url "$TORCH_INDEX_URL" "$cpu_torch"; then
    exit 0
fi
cat >&2 <<MESSAGE

The CPU build of torch ($cpu_torch) was found neither in pip's own sources nor at $TORCH_INDEX_URL.
Mend one of these and run make again:
  - allow access to that address, or name a mirror: make TORCH_INDEX_URL=https://... setup
  - put the wheel into a folder and tell pip: PIP_FIND_LINKS=/that/folder make setup
MESSAGE
exit 1
