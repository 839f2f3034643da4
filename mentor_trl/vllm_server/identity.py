"""Whether models are the same, and whose weights a server may load. Imports nothing of vLLM."""

import hashlib
import os
import stat
from pathlib import Path

import torch


CHUNK = 1 << 22
BLOCKS, BLOCK_BYTES = 64, 1 << 12


def weights_digest(module: torch.nn.Module) -> str:
    """
    Digest of all parameters, made where they are: exact sums of their bits, with and without their positions. It tells
    models apart that differ by accident; nobody is kept from making two that agree.
    """
    digest = hashlib.sha256()
    for name, value in sorted(module.named_parameters(), key=lambda item: item[0]):
        data = value.detach().flatten().view(torch.uint8)
        if data.numel() % 4 == 0 and data.storage_offset() % 4 == 0:
            data = data.view(torch.int32)
        sums = torch.zeros(2, dtype=torch.int64, device=data.device)
        for start in range(0, data.numel(), CHUNK):
            part = data[start : start + CHUNK].long()
            places = torch.arange(start + 1, start + 1 + part.numel(), device=data.device)
            sums += torch.stack([part.sum(), (part * places).sum()])  # int64 wraps round, in any order alike
        digest.update(repr((name, tuple(value.shape), str(value.dtype), sums.tolist())).encode())
    return digest.hexdigest()


def files_digest(folder: str) -> str | None:
    """Digest of names, sizes and blocks of the weight files of a model's folder; `None` where there are none."""
    files = sorted(file for kind in ("*.safetensors", "*.bin") for file in Path(folder).glob(kind))
    digest = hashlib.sha256()
    for file in files:
        with open(file, "rb") as opened:
            size = opened.seek(0, os.SEEK_END)
            digest.update(f"{file.name} {size}".encode())
            for block in range(BLOCKS):
                opened.seek(max(size - BLOCK_BYTES, 0) * block // (BLOCKS - 1))
                digest.update(opened.read(BLOCK_BYTES))
    return digest.hexdigest() if files else None


def distrust(status: os.stat_result) -> str | None:
    """Why this process should not load what another user may have written, or `None`."""
    if status.st_uid not in (0, os.geteuid()):
        return f"belongs to user {status.st_uid} and not to user {os.geteuid()}"
    if stat.S_IMODE(status.st_mode) & (stat.S_IWGRP | stat.S_IWOTH):
        return "can be written by other users (`chmod go-w`)"
    return None
