"""The study's runner on a plan of a few steps and models that know nothing; arguments are those of the runner."""

import sys

from benchmarks.study import arms, prepare, run


PLAN = {
    "settings": {"steps": 4, "evaluate_every": 2, "prompts": 4, "samples": 2, "final_samples": 4},
    "tasks": {"chain": {"max_completion_length": 12}},
    "arms": {
        "policy": {"label": "before"},
        "grpo": {"label": "GRPO", "stages": [{"recipe": "recipes/quickstart/grpo.yaml"}]},
        "mentor": {
            "label": "MENTOR",
            "expert": True,
            "stages": [
                {
                    "recipe": "recipes/quickstart/mentor.yaml",
                    "options": {"expert_model_name_or_path": "{folder}/models/expert_{expert}"},
                }
            ],
        },
        "sft_grpo": {
            "label": "SFT, then GRPO",
            "expert": True,
            "stages": [
                {
                    "recipe": "benchmarks/study/sft.yaml",
                    "share": 0.5,
                    "options": {"learning_rate": 1e-3, "dataset_name": "{folder}/sft_{expert}"},
                },
                {"recipe": "recipes/quickstart/grpo.yaml", "share": 0.5},
            ],
        },
    },
    "studies": {
        "main": [{"tasks": ["chain"], "arms": ["policy", "grpo", "mentor", "sft_grpo"], "seeds": [1]}],
        "other": [{"tasks": ["chain"], "arms": ["grpo"], "seeds": [1]}],
    },
}
TINY = prepare.Settings(
    num_test_prompts=8,
    num_train_prompts=64,
    hidden_size=8,
    intermediate_size=8,
    num_hidden_layers=1,
    num_attention_heads=1,
    base=prepare.Phase(steps=2, learning_rate=1e-3, batch_size=4),
    tuned=prepare.Phase(steps=1, learning_rate=1e-3, batch_size=4),
    samples=1,
)


def main() -> int:
    make_files = prepare.prepare
    prepare.prepare = lambda task, seed, folder, model: make_files(task, seed, folder, TINY, model)
    arms.Plan.read = classmethod(lambda cls: cls(PLAN))
    return run.main()


if __name__ == "__main__":
    sys.exit(main())
