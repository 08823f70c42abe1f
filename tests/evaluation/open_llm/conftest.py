"""lm-eval tasks made of local files: multiple choice, generation, rolling log-likelihood."""

import json
import random
from pathlib import Path

import pytest
from runs import words
from transformers import AutoModelForCausalLM, AutoTokenizer

TASK = """
task: {task}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {kind}
"""
CHOICE = """
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_choice: "{{choices}}"
doc_to_target: answer
fewshot_split: test
num_fewshot: 2
fewshot_config: {sampler: first_n}
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
GENERATE = """
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["o"], max_gen_toks: 8, do_sample: false}
num_fewshot: 0
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""
ROLLING = """
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - {metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}
"""


def write_task(folder: Path, task: str, kind: str, rows: list[dict], rest: str) -> None:
    """A task's YAML and its data."""
    data = folder / f"{task}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / f"{task}.yaml").write_text(TASK.format(task=task, data=data, kind=kind) + rest)


@pytest.fixture(scope="session")
def task_folder(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    """Three tasks: toy_choice, toy_generate (the toy model answers two of five right), toy_rolling; a group of two."""
    folder = tmp_path_factory.mktemp("tasks")
    draw = random.Random(0)
    choices = [
        {
            "question": words(draw, 3, 9),
            "choices": [words(draw, 1, 4) for _ in range(draw.choice([3, 4]))],
            "answer": draw.randrange(3),
        }
        for _ in range(9)
    ]
    write_task(folder, "toy_choice", "multiple_choice", choices, CHOICE)
    questions = [{"question": words(draw, 1, 6), "answer": words(draw, 1, 2)} for _ in range(5)]
    causal_lm, tokenizer = (
        AutoModelForCausalLM.from_pretrained(model_folder),
        AutoTokenizer.from_pretrained(model_folder),
    )
    for row in questions[:2]:
        ids = tokenizer(row["question"], return_tensors="pt").input_ids
        new = causal_lm.generate(ids, do_sample=False, max_new_tokens=8)[0, ids.shape[1] :]
        row["answer"] = tokenizer.decode(new, skip_special_tokens=True).split("o")[0]
    write_task(folder, "toy_generate", "generate_until", questions, GENERATE)
    texts = [{"text": words(draw, 3, 40)} for _ in range(4)]
    write_task(folder, "toy_rolling", "loglikelihood_rolling", texts, ROLLING)
    (folder / "group.yaml").write_text("group: toy_group\ntask: [toy_choice, toy_generate]\n")
    return folder
