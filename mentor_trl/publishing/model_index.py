"""Results of evaluations in a model card, as `model-index` and as a table, in a local folder or on the Hub."""

import re
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import RemoteEntryNotFoundError

from ..errors import SetupError
from ..evaluation import TASKS
from ..evaluation.summary import to_table
from .hub import HUB_ERRORS, one_line


# What lies between is replaced when there are new results
_START, _END = "<!-- mentor-trl eval: results -->", "<!-- end of results -->"


def model_index(results: dict[str, Any]) -> list[EvalResult]:
    """
    Turn results of [`~mentor_trl.evaluation.summary.collect`] into the entries of a model card's `model-index`: for
    each set its metric and, where several samples were drawn, pass@k for the largest k, in percent.

    Raises:
        [`SetupError`]: if only the first problems of the sets were evaluated.
    """
    limit = results["settings"].get("limit")
    if limit is not None:
        raise SetupError(
            f"Only the first {limit} problems of each set were evaluated, which is no result for a model card; "
            "evaluate again without `limit`"
        )
    entries = []
    for name, summary in results["tasks"].items():
        entries.append(_entry(name, summary, summary["metric"], summary))
        k = max(map(int, summary["pass_at_k"]))
        if k > 1:
            entries.append(_entry(name, summary, f"pass@{k}", summary["pass_at_k"][str(k)]))
    return entries


def _entry(name: str, summary: dict[str, Any], metric: str, estimate: dict[str, Any]) -> EvalResult:
    return EvalResult(
        task_type="text-generation",
        dataset_type=summary["dataset"]["path"],
        dataset_name=TASKS[name],
        dataset_config=summary["dataset"].get("config"),
        dataset_split=summary["dataset"]["split"],
        metric_type="accuracy" if metric.startswith("avg") else "pass@k",
        metric_name=metric,
        metric_value=round(100.0 * estimate["value"], 2),
        metric_args={
            "num_samples": summary["num_samples"],
            "temperature": summary["temperature"],
            "confidence_interval": [round(100.0 * estimate[end], 2) for end in ("low", "high")],
        },
    )


def update_card(card: ModelCard, entries: list[EvalResult], model_name: str) -> ModelCard:
    """
    Put results into a card: its `model-index`, and a table below the text. An entry of the same set and metric is
    replaced, others stay.
    """
    kept = [old for old in card.data.eval_results or [] if _place(old) not in map(_place, entries)]
    card.data.eval_results = kept + entries
    card.data.model_name = card.data.model_name or model_name
    section = _results_section(card.data.eval_results)
    pattern = re.compile(f"{re.escape(_START)}.*?{re.escape(_END)}", re.DOTALL)
    if pattern.search(card.text):
        card.text = pattern.sub(lambda _: section, card.text, count=1)
    else:
        before, heading, after = card.text.partition("\n## Citations\n")
        card.text = f"{before.rstrip()}\n\n{section}\n{heading}{after}"
    return card


def _results_section(entries: list[EvalResult]) -> str:
    rows = [["set", "metric", "%", "95% interval", "samples a problem", "temperature"]]
    for entry in entries:
        details = entry.metric_args or {}
        if "confidence_interval" in details:  # of ours
            low, high = details["confidence_interval"]
            value, interval = f"{entry.metric_value:.2f}", f"{low:.2f} to {high:.2f}"
            sampling = [f"{details['num_samples']}", f"{details['temperature']:g}"]
            rows.append([entry.dataset_name, entry.metric_name or entry.metric_type, value, interval, *sampling])
    note = "Measured by `mentor-trl eval`; the intervals are over the problems of a set."
    return "\n\n".join([_START, "## Results", note, to_table(rows), _END])


def _place(entry: EvalResult) -> tuple:
    # Not `EvalResult.is_equal_except_value`: its identity includes the metric's arguments, which hold the interval.
    names = ("task_type", "dataset_type", "dataset_config", "dataset_split", "metric_type", "metric_name")
    return tuple(getattr(entry, name) for name in names)


def write_card(folder: str | Path, entries: list[EvalResult], model_name: str) -> Path:
    """Write results into the `README.md` of a folder, which is made if there is none."""
    path = Path(folder).expanduser() / "README.md"
    if not path.parent.is_dir():
        raise SetupError(f"The folder {path.parent} (`model_card`) does not exist")
    card = ModelCard.load(path, ignore_metadata_errors=False) if path.exists() else _new_card(model_name)
    update_card(card, entries, model_name).save(path)
    return path


def _new_card(model_name: str) -> ModelCard:
    data = ModelCardData(library_name="transformers", tags=["mentor-trl"])
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n# {model_name}\n")


def push_card(repo_id: str, entries: list[EvalResult], **kwargs: Any) -> str:
    """Write results into the card of a model on the Hub; returns the address of the commit."""
    name = repo_id.rpartition("/")[2]
    kwargs = {"commit_message": "Results of mentor-trl eval", **kwargs}
    try:
        try:
            card = ModelCard.load(repo_id, token=kwargs.get("token"))
        except RemoteEntryNotFoundError:
            card = _new_card(name)
        return str(update_card(card, entries, name).push_to_hub(repo_id, **kwargs))
    except HUB_ERRORS as error:
        raise SetupError(
            f"The results cannot be pushed to the card of {repo_id!r}: {one_line(error)}; log in (`hf auth login`), "
            "check the name and the connection. The results that were written are not lost"
        ) from error
