"""The devices that a run is planned for."""

from dataclasses import dataclass

import psutil
import torch

from ..errors import SetupError
from .memory import GIB


@dataclass(frozen=True)
class Hardware:
    """
    Attributes:
        gpus (`int`): Number of GPUs, 0 for the CPU.
        memory (`float`): GiB of one of them, or of the machine.
        given (`bool`): Whether it was said rather than found.
    """

    gpus: int
    memory: float
    given: bool = False

    def __str__(self) -> str:
        what = f"{self.gpus} GPU{'s' if self.gpus > 1 else ''} of {self.memory:.0f} GB" if self.gpus else ""
        return what if self.gpus else f"a CPU with {self.memory:.0f} GB"

    @property
    def processes(self) -> int:
        return max(self.gpus, 1)


def find_hardware(gpus: int | None = None, gpu_memory: float | None = None) -> Hardware:
    """
    What was said, and else what this machine has. The smallest GPU counts.

    Raises:
        [`SetupError`]: if the numbers are none, or a GPU's memory can neither be read nor was said.
    """
    if gpus is not None and gpus < 0 or gpu_memory is not None and gpu_memory <= 0:
        raise SetupError(
            f"`gpus` is {gpus} and `gpu_memory` {gpu_memory}; give positive ones, or `--gpus 0` for a CPU"
        )
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus is None:
        gpus = found or (1 if gpu_memory is not None else 0)
    if gpus == 0:
        return Hardware(0, psutil.virtual_memory().total / GIB)
    if gpu_memory is not None:
        return Hardware(gpus, gpu_memory, True)
    if not found:
        raise SetupError(f"`gpus` is {gpus}, and this machine has none to read the memory of; say it: --gpu_memory 80")
    sizes = [torch.cuda.get_device_properties(index).total_memory / GIB for index in range(found)]
    return Hardware(gpus, min(sizes), gpus != found)
