"""How a model's rows can advance: measured on a few tokens, whatever its architecture is called."""

import weakref

import torch
from accelerate.utils import is_peft_model
from transformers import PreTrainedModel

from ...errors import SetupError
from ...experts.compatibility import text_model
from .decoder import Decoder, inference, refuse_nan
from .lockstep import Ability, LockstepDecoder


ROWS, LENGTH = 3, 9
# What a model may raise that is decoded in a way it does not know
_FAILURES = (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError)

_known: "weakref.WeakKeyDictionary[PreTrainedModel, Ability]" = weakref.WeakKeyDictionary()


@torch.no_grad()
def check_decoding(model, name: str) -> Ability:
    """
    How rows of a model can advance, from a few tokens that are decoded in steps and compared with its own forward
    pass: ragged, with wrong tokens that are rolled back, or else together, padded on the left. A model is measured
    once.

    Raises:
        [`SetupError`]: if both differ from the forward pass (by how much is said), if the logits are made in a way
        that is not known, or if they are NaN.
    """
    base = text_model(model)
    if is_peft_model(model) and model.active_peft_config.is_prompt_learning:
        kind = model.active_peft_config.peft_type.value
        raise _refusal(base, name, f"{kind} puts virtual tokens before the prompt")
    if base not in _known:
        _known[base] = _measure(base, name)
    return _known[base]


def _refusal(base: PreTrainedModel, name: str, reason: str) -> SetupError:
    return SetupError(
        f"The {name} ({type(base).__name__}) cannot sample mixed rollouts: {reason}. Use a model whose decoding "
        "equals its forward pass (Llama, Qwen, Mistral, Gemma, LFM2, Mamba2, ...), or set `num_mixed_generations` to "
        "0."
    )


def _measure(base: PreTrainedModel, name: str) -> Ability:
    size = min(base.get_input_embeddings().weight.size(0), base.get_output_embeddings().weight.size(0))
    ids = torch.randint(size, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    trial = _Trial(base, ids.to(base.get_input_embeddings().weight.device))
    try:
        # "sdpa" stands for the model's own kernels, which may refuse the data type or device it has before training
        with inference(base, attention="sdpa"):
            known = trial.forward()
    except _FAILURES as error:
        raise _refusal(base, name, f"its forward pass fails with {_text(error)}") from error
    refuse_nan(trial.expected, name, SetupError)
    if not known:
        raise _refusal(base, name, "it makes its logits from the hidden states in a way that is not known")
    ragged = _problem(trial.ragged, "each row by itself")
    if ragged is None:
        return Ability()
    together = _problem(trial.together, "all rows together, padded on the left")
    if together is not None:
        raise _refusal(base, name, f"{ragged}; {together}")
    return Ability(ragged=False, blocks=_problem(trial.blocks, "") is None, reason=ragged)


def _problem(trial, how: str) -> str | None:
    try:
        difference, allowed = trial()
    except _FAILURES as error:
        return f"decoding {how} fails with {_text(error)}"
    if difference <= allowed:
        return None
    return f"its log-probabilities differ by {difference:.2g} nats when it decodes {how}"


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().rstrip('.')}"


class _Trial:
    """A few rows of a model by its forward pass and by decoding in steps."""

    def __init__(self, base: PreTrainedModel, ids: torch.Tensor):
        self.base, self.ids = base, ids
        self.float32 = base.dtype == torch.float32

    def forward(self) -> bool:
        """Compute the logits to be met. Returns whether those made from hidden states are the model's own."""
        decoder = Decoder(self.base)
        logits = self.base(input_ids=self.ids, use_cache=False).logits.float().to(decoder.device)
        direct = decoder.logits(self.base.base_model(input_ids=self.ids, use_cache=False)[0])
        self.expected = logits.log_softmax(-1)
        # Half precision rounds logits to 3 digits at best, and the two ways round differently
        self.scale = logits.abs().max().clamp(min=1.0).item()
        difference = (direct - logits).abs().max().item()
        return bool(logits.isnan().any()) or difference <= self.scale * (1e-4 if self.float32 else 2e-2)

    @property
    def allowed(self) -> float:
        """Nats that rounding explains."""
        if not self.float32:
            return 0.5
        rounded = self.ids.device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32
        return 1e-2 if rounded else 1e-4 * self.scale

    def _difference(self, logps: torch.Tensor, expected: torch.Tensor) -> tuple[float, float]:
        """By how much log-probabilities differ, and may."""
        difference = (logps - expected).abs()
        return (difference.max() if self.float32 else difference.median()).item(), self.allowed

    def ragged(self) -> tuple[float, float]:
        """Each row at its own length, after wrong tokens in the same places."""
        decoder, ids, rows = Decoder(self.base, slots=ROWS), self.ids, list(range(ROWS))
        starts = torch.tensor([1, LENGTH - 1, 4], device=ids.device)
        # A row that is at its end is padded with its last position: masks that go by the order of queries fail there
        positions = (starts.unsqueeze(1) + torch.arange(2, device=ids.device)).clamp(max=LENGTH - 1)
        true, size = ids.gather(1, positions), self.expected.size(-1)
        with inference(self.base):
            decoder.prefill(rows, [tuple(ids[row, : int(start) + 1].tolist()) for row, start in enumerate(starts)])
            decoder.forward((true + 1) % size, positions, ROWS, LENGTH)
            hidden = decoder.forward(true, positions, ROWS, LENGTH)
            logps = decoder.logits(hidden.flatten(0, 1)).log_softmax(-1).view(ROWS, 2, -1)
        return self._difference(logps, self.expected.gather(1, positions.unsqueeze(-1).expand_as(logps)))

    def together(self) -> tuple[float, float]:
        """Rows of different length, padded on the left; one of them ends early."""
        ends, decoder = self._begin()
        worst = 0.0
        with inference(self.base, attention="sdpa"):
            for count in range(4):
                rows = [0, 1, 2] if count < 2 else [0, 2]
                if count == 2:
                    decoder.move([2], [1], LENGTH)
                difference, allowed = self._difference(*self._step(decoder, rows, ends[rows] + count))
                worst = max(worst, difference)
                if worst > allowed:
                    break  # there may be nothing to go on with
        return worst, allowed

    def blocks(self) -> tuple[float, float]:
        """Several tokens in one pass, behind those that are cached."""
        ends, decoder = self._begin()
        with inference(self.base, attention="sdpa"):
            self._step(decoder, [0, 1, 2], ends)
            return self._difference(*self._step(decoder, [0, 1, 2], ends + 3, 3))

    def _begin(self) -> tuple[torch.Tensor, LockstepDecoder]:
        decoder = LockstepDecoder(self.base, blocks=True)
        lengths = [1, 5, 3]
        with inference(self.base, attention="sdpa"):
            prompts = [tuple(self.ids[row, :length].tolist()) for row, length in enumerate(lengths)]
            decoder.prefill(list(range(ROWS)), prompts)
        return torch.tensor(lengths, device=self.ids.device) - 1, decoder

    def _step(self, decoder: LockstepDecoder, rows: list[int], ends: torch.Tensor, count: int = 1):
        """Log-probabilities behind `count` more tokens of rows, up to the positions `ends`, and those to be met."""
        index = torch.tensor(rows, device=ends.device).unsqueeze(1)
        at = ends.unsqueeze(1) - count + 1 + torch.arange(count, device=ends.device)
        hidden = decoder.forward(self.ids[index, at], at, len(rows), LENGTH)
        logps = decoder.logits(hidden.flatten(0, 1)).log_softmax(-1).view(len(rows), count, -1)
        return logps, self.expected[index, at]
