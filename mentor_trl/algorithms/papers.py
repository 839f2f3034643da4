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
