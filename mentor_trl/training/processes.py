"""What the processes of a run say to each other."""

import torch
from accelerate import Accelerator
from torch.distributed import ReduceOp


_OPERATIONS = {"sum": ReduceOp.SUM, "min": ReduceOp.MIN, "max": ReduceOp.MAX}


class Processes:
    """
    Collectives over the processes of a run: all of them call each together.

    Args:
        accelerator ([`~accelerate.Accelerator`]):
            Accelerator of the trainer.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator

    @property
    def index(self) -> int:
        return self.accelerator.process_index

    @property
    def count(self) -> int:
        return self.accelerator.num_processes

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    def local(self, rows: int) -> slice:
        """Place of this process's rows among all, where each process has `rows` of them."""
        return slice(self.index * rows, (self.index + 1) * rows)

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        """Values of all processes, in their order, from as many on each."""
        return self.accelerator.gather(values.to(self.device))

    def gather_tokens(self, values: torch.Tensor) -> torch.Tensor:
        """Values of all processes, `(N,)`, from any number on each; NaN is left out."""
        padded = self.accelerator.pad_across_processes(values.to(self.device), pad_index=torch.nan)
        gathered = self.accelerator.gather(padded)
        return gathered[~gathered.isnan()]

    def reduce(self, values: torch.Tensor, how: str) -> torch.Tensor:
        """`"sum"`, `"min"` or `"max"` of a tensor over the processes."""
        values = values.to(self.device)
        if self.count > 1:
            torch.distributed.all_reduce(values, op=_OPERATIONS[how])
        return values

    def everywhere(self, flag: bool) -> bool:
        """Whether a flag is set on all processes."""
        return bool(self.reduce(torch.tensor([float(flag)]), "min").item())
