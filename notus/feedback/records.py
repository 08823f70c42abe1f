"""The record that `notus sample` writes, `notus rate` fills with ratings, and `notus curate` takes: UltraFeedback's.

A record is one line of JSON:

    source          where the prompt comes from: its own `source`, or the prompts file's name
    instruction     the prompt as a judge reads it
    messages        only where the prompt is more than one user turn: the turns before the answer
    tools, chat_template_kwargs
                    only where the prompt has them, for the chat template
    models          the different models of the completions
    completions     a list of
        model           the model's name
        response        its text
        settings        how it was generated: temperature, top_p, ..., and `sample`, from 0 on, among the prompt's own
        finish_reason   "stop": it ended by itself; "length": it was cut at its most tokens
        tokens          how many it took; null if an endpoint does not say
        annotations     once it is rated: per aspect an object with a `Rating`, "1" to "5" or "N/A", and a `Rationale`
        fine-grained_score
                        once it is rated: the mean of these ratings; absent without any
        reward          once a reward model scored it: a finite number on that model's own scale
    rated           once it is rated: `judge`, and `order`, the places of `completions` in the order the judge saw

Keys of the prompt's own row that do not collide with these stay where they are (`correct_answers`, an id).
Beside a file records.jsonl stand records.summary.json (what the command printed) and records.jsonl.kept/ (finished
work, for resuming).
"""

from pathlib import Path

ASPECTS = ("instruction_following", "honesty", "truthfulness", "helpfulness")
NOT_RATED = "N/A"


def summary_file(records: Path) -> Path:
    """Return where the summary of a file of records stands: records.summary.json beside records.jsonl."""
    return records.with_suffix(".summary.json")


def kept_folder(records: Path) -> Path:
    """Return where unfinished work on a file of records is kept: records.jsonl.kept beside records.jsonl."""
    return records.with_name(records.name + ".kept")
