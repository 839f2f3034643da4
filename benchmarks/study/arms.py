"""What the study runs: study.yaml read into runs, each with everything that it depends on."""

import itertools
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks.study.store import key_of


FILE = Path(__file__).with_name("study.yaml")
TUNED = Path(__file__).with_name("tuned.yaml")
# An arm of which nothing is trained is a model that is evaluated
UNTRAINED = {"policy": "policy", "expert": "expert_{expert}"}


@dataclass(frozen=True)
class Stage:
    """
    A training of an arm: a recipe of `mentor-trl train`, or one of `trl sft`, with options of its own.

    Args:
        recipe (`str`):
            Path of the recipe.
        steps (`int`):
            Optimizer steps.
        options (`dict[str, Any]`):
            Fields that are set. `{expert}` stands for the name of the expert, `{expert_score}` for its accuracy, and
            `{folder}` for the prepared files.
    """

    recipe: str
    steps: int
    options: dict[str, Any]

    @property
    def supervised(self) -> bool:
        return Path(self.recipe).stem == "sft"


@dataclass(frozen=True, eq=False)
class Run:
    """
    A run of the study.

    Args:
        study, task, arm, label (`str`):
            Where it belongs.
        expert (`str`, *optional*):
            Name of the expert, where the arm has one.
        seed (`int`):
            Seed of the base, of all that is tuned from it, of the data and of the training.
        stages (`tuple[Stage, ...]`):
            Trainings one after the other.
        evaluation (`dict[str, Any]`):
            How checkpoints are evaluated.
    """

    study: str
    task: str
    arm: str
    label: str
    expert: str | None
    seed: int
    stages: tuple[Stage, ...]
    evaluation: dict[str, Any]

    @property
    def key(self) -> str:
        """The same for the same training and evaluation, under whatever name and in whatever study."""
        described = asdict(self)
        for name in ("study", "label", "arm"):
            described.pop(name)
        return key_of(described | ({} if self.stages else {"arm": self.arm}))

    @property
    def name(self) -> str:
        return "-".join(filter(None, (self.task, self.arm, self.expert, f"seed{self.seed}")))


class Plan:
    """
    The study of a file.

    Args:
        config (`dict[str, Any]`):
            Content of study.yaml.
        tuned (`dict[str, Any]`, *optional*):
            Options that the tuning chose, by task and arm.
    """

    def __init__(self, config: dict[str, Any], tuned: dict[str, Any] | None = None):
        self.config, self.tuned = config, tuned or {}

    @classmethod
    def read(cls) -> "Plan":
        tuned = yaml.safe_load(TUNED.read_text()) if TUNED.exists() else {}
        return cls(yaml.safe_load(FILE.read_text()), tuned)

    def runs(self, study: str) -> Iterator[Run]:
        """
        Runs of a study, each once, those of one seed together and the first seeds first, so that a study that is
        stopped has all arms.
        """
        blocks, seen = self.config["studies"][study], set()
        seeds = sorted({seed for block in blocks for seed in block["seeds"]})
        for seed in seeds:
            for block in (block for block in blocks if seed in block["seeds"]):
                for task, arm in itertools.product(block["tasks"], block["arms"]):
                    experts = block.get("experts", ["strong"]) if self.arm(arm).get("expert") else [None]
                    for expert, extra in itertools.product(experts, self._grid(block, arm)):
                        run = self._run(study, task, arm, expert, seed, extra)
                        if (arm, run.key) not in seen:
                            yield run
                        seen.add((arm, run.key))

    def arm(self, name: str) -> dict[str, Any]:
        """An arm with what it takes over from another."""
        arm = self.config["arms"][name]
        return {**self.arm(arm["like"]), **arm} if "like" in arm else arm

    def _grid(self, block: dict[str, Any], arm: str) -> list[dict[str, Any]]:
        """
        Options of each point of a search: the learning rates of the block, and each alternative to the arm's own
        coefficient at the one in the middle, where the block does not say otherwise.
        """
        rates = block.get("learning_rates")
        if rates is None:
            return [{}]
        points = [{"learning_rate": rate} for rate in rates]
        if block.get("alternatives", True):
            ((name, values),) = self.arm(arm)["alternatives"].items()
            points += [{"learning_rate": rates[len(rates) // 2], name: value} for value in values]
        return points

    def _run(self, study: str, task: str, name: str, expert: str | None, seed: int, extra: dict[str, Any]) -> Run:
        config, arm = self.config["tasks"][task], self.arm(name)
        settings = {**self.config["settings"], **config.get("settings", {})}
        tuned = {} if extra else self.tuned.get(task, {}).get(arm.get("like", name), {})
        stages = []
        for position, stage in enumerate(arm.get("stages", ())):
            last = position == len(arm["stages"]) - 1
            options = {"max_completion_length": config["max_completion_length"], "learning_rate": 2e-4}
            if Path(stage["recipe"]).stem == "sft":
                options = {}
            options |= {**config.get("options", {}), **stage.get("options", {})}
            # What is tuned and what an ablation changes belongs to the last stage, or to all that have the field
            options |= {key: value for key, value in {**tuned, **extra}.items() if last or key in options}
            options |= arm.get("options", {}) if last else {}
            steps = round(settings["steps"] * stage.get("share", 1.0))
            stages.append(Stage(stage["recipe"], steps, options))
        label = " ".join([arm["label"], *(f"{key}={value}" for key, value in extra.items())])
        evaluation = {key: settings[key] for key in ("evaluate_every", "prompts", "samples", "final_samples")}
        return Run(study, task, name, label, expert, seed, tuple(stages), evaluation)
