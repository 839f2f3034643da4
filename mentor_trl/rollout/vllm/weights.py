"""Handing a policy's weights over through a folder that trainer and server share."""

import shutil
from collections.abc import Iterable
from pathlib import Path

import torch


SHARD_BYTES = 4 << 30


def write_weights(
    weights: Iterable[tuple[str, torch.Tensor]], folder: str | Path, dtype: torch.dtype | None = None
) -> None:
    """
    Write weights as safetensors files. The folder appears under its name only when it is complete.

    Args:
        weights (`Iterable[tuple[str, torch.Tensor]]`):
            Names, as in a transformers checkpoint, and tensors.
        folder (`str` or `Path`):
            Folder to make; replaced if it exists.
        dtype (`torch.dtype`, *optional*):
            Data type to write floating-point weights in.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    shard, size, count = {}, 0, 0

    def flush():
        nonlocal shard, size, count
        save_file(shard, partial / f"model-{count:05d}.safetensors")
        shard, size, count = {}, 0, count + 1

    for name, tensor in weights:
        tensor = tensor.detach()
        if dtype is not None and tensor.is_floating_point():
            tensor = tensor.to(dtype)
        if shard and size + tensor.nbytes > SHARD_BYTES:
            flush()
        # A copy, since safetensors refuses names that share storage (tied embeddings)
        shard[name] = tensor.to("cpu", copy=True).contiguous()
        size += tensor.nbytes
    flush()
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def remove_weights(root: str | Path, run_id: str, keep: str | None = None) -> None:
    """Remove the weights that a run has written for its servers, except those of the version `keep`."""
    for folder in Path(root).glob(f"{run_id}-*"):
        if folder.name != keep:
            shutil.rmtree(folder, ignore_errors=True)
