"""What a card asks its readers to cite."""

from collections.abc import Iterator

from notus.evaluation.release.facts import Facts

_DPO = """@inproceedings{rafailov2023direct,
  title = {Direct Preference Optimization: Your Language Model is Secretly a Reward Model},
  author = {Rafael Rafailov and Archit Sharma and Eric Mitchell and Christopher D. Manning and Stefano Ermon and
    Chelsea Finn},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2023},
  url = {https://arxiv.org/abs/2305.18290}
}"""
_ULTRAFEEDBACK = """@misc{cui2023ultrafeedback,
  title = {UltraFeedback: Boosting Language Models with Scaled AI Feedback},
  author = {Ganqu Cui and Lifan Yuan and Ning Ding and others},
  year = {2023},
  eprint = {2310.01377},
  archivePrefix = {arXiv}
}"""
_NOTUS = """@misc{notus2023,
  title = {Notus 7B v1},
  author = {{Argilla}},
  year = {2023},
  howpublished = {\\url{https://huggingface.co/argilla/notus-7b-v1}}
}"""
_SOFTWARE = """@software{notus,
  title = {Notus: Direct Preference Optimization in pure PyTorch},
  author = {{Notus contributors}}
}"""


def citations(facts: Facts) -> list[str]:
    """BibTeX entries: of the method, the data where it is known, the recipe, and this software."""
    return list(_entries(facts))


def _entries(facts: Facts) -> Iterator[str]:
    if facts.task == "dpo":
        yield _DPO
    if any("ultrafeedback" in source["path"].rpartition("/")[2].lower() for source in facts.settings["data"]["train"]):
        yield _ULTRAFEEDBACK
    if facts.task == "dpo":
        yield _NOTUS
    yield _SOFTWARE
