"""Papers as model cards cite them."""

MENTOR_PAPER = {
    "title": "Selective Expert Guidance for Effective and Diverse Exploration in Reinforcement Learning of LLMs",
    "id": "2510.04140",
    # docstyle-ignore
    "citation": """\
@inproceedings{jiang2026selective,
    title     = {{Selective Expert Guidance for Effective and Diverse Exploration in Reinforcement Learning of LLMs}},
    author    = {Zishang Jiang and Jinyi Han and Tingyun Li and Xinyi Wang and Sihang Jiang and Jiaqing Liang and
                 Zhaoqian Dai and Shuguang Ma and Fei Yu and Yanghua Xiao},
    year      = 2026,
    booktitle = {International Conference on Learning Representations},
    note      = {arXiv:2510.04140}
}""",
}

LUFFY_PAPER = {
    "title": "Learning to Reason under Off-Policy Guidance",
    "id": "2504.14945",
    # docstyle-ignore
    "citation": """\
@article{yan2025learning,
    title   = {{Learning to Reason under Off-Policy Guidance}},
    author  = {Jianhao Yan and Yafu Li and Zican Hu and Zhi Wang and Ganqu Cui and Xiaoye Qu and Yu Cheng and
               Yue Zhang},
    year    = 2025,
    journal = {arXiv preprint arXiv:2504.14945}
}""",
}

OPD_PAPER = {
    "title": "On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes",
    "id": "2306.13649",
    # docstyle-ignore
    "citation": """\
@inproceedings{agarwal2024onpolicy,
    title     = {{On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes}},
    author    = {Rishabh Agarwal and Nino Vieillard and Yongchao Zhou and Piotr Stanczyk and Sabela Ramos and
                 Matthieu Geist and Olivier Bachem},
    year      = 2024,
    booktitle = {International Conference on Learning Representations},
    note      = {arXiv:2306.13649}
}""",
}

DISTILLED_RL_PAPER = {
    "title": "Distilled Reinforcement Learning for LLM Post-Training",
    "id": "2607.17247",
    # docstyle-ignore
    "citation": """\
@misc{distilledrl2026,
    title  = {{Distilled Reinforcement Learning for LLM Post-Training}},
    year   = 2026,
    eprint = {2607.17247},
    archivePrefix = {arXiv}
}""",
}
