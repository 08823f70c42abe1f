import pytest

from notus.curation import synthetic


def test_no_prompt_is_in_two_lists() -> None:
    lists = synthetic.make_prompts([200, 100, 40], seed=0)
    assert [len(prompts) for prompts in lists] == [200, 100, 40]
    asked = [(prompt.task.name, prompt.digits) for prompts in lists for prompt in prompts]
    assert len(set(asked)) == len(asked)


def test_the_seed_decides_everything() -> None:
    def made(seed: int) -> tuple[object, object]:
        (prompts,) = synthetic.make_prompts([20], seed=seed)
        return synthetic.demonstrations(prompts, seed=seed), synthetic.ultrafeedback_records(prompts, seed=seed)

    assert made(1) == made(1)
    assert made(1)[0] != made(2)[0]
    assert made(1)[1] != made(2)[1]


@pytest.mark.parametrize(
    ("task", "digits", "right"),
    [("largest", "3914", "9"), ("count", "39142", "5"), ("sort", "3914", "1349"), ("repeat", "3914", "3914")],
)
def test_the_judge_knows_the_answers(task: str, digits: str, right: str) -> None:
    (found,) = [item for item in synthetic.TASKS if item.name == task]
    for phrasing in found.phrasings:
        assert synthetic.judge(phrasing.format(digits), f" {right}\n")
        assert not synthetic.judge(phrasing.format(digits), found.mistake(digits))
        assert not synthetic.judge(phrasing.format(digits), f"{right} or so")


def test_the_judge_answers_for_its_own_prompts_alone() -> None:
    with pytest.raises(ValueError, match="knows no answer to 'Hello'"):
        synthetic.judge("Hello", "Hi")


def test_win_rate_is_the_share_of_right_answers() -> None:
    (prompts,) = synthetic.make_prompts([4], seed=0)
    instructions = [prompt.instruction for prompt in prompts]
    answers = [synthetic.right_answer(instruction) for instruction in instructions]
    assert synthetic.win_rate(instructions, answers) == 1.0
    assert synthetic.win_rate(instructions, [*answers[:3], "no"]) == 0.75


def test_hard_tasks_are_mostly_answered_wrong_and_easy_ones_right() -> None:
    (prompts,) = synthetic.make_prompts([800], seed=0)
    rows = synthetic.demonstrations(prompts, seed=0)
    right = {True: 0, False: 0}
    for prompt, row in zip(prompts, rows, strict=True):
        question, answer = (turn["content"] for turn in row["messages"])
        assert question == prompt.instruction
        right[prompt.task.hard] += synthetic.judge(question, answer)
    assert right[True] / 400 < 0.5 < 0.75 < right[False] / 400


def test_records_have_ultrafeedbacks_form_and_faults() -> None:
    (prompts,) = synthetic.make_prompts([300], seed=0)
    records = synthetic.ultrafeedback_records(prompts, seed=0)
    completions = [completion for record in records for completion in record["completions"]]
    assert all(len(record["completions"]) == len(record["models"]) == 4 for record in records)
    ratings = [aspect["Rating"] for completion in completions for aspect in completion["annotations"].values()]
    assert set(ratings) == {"1", "2", "3", "4", "5", "N/A"}
    assert 0.05 < ratings.count("N/A") / len(ratings) < 0.15
    wrong_tens = [c for c in completions if c["overall_score"] == 10]
    assert wrong_tens
    assert all(completion["critique"] == "The answer is wrong." for completion in wrong_tens)


def test_the_fault_rate_changes_the_overall_scores_alone() -> None:
    (prompts,) = synthetic.make_prompts([200], seed=0)
    scores: dict[float, list[float]] = {}
    rest = []
    for rate in (0.0, 0.5, 1.0):
        records = synthetic.ultrafeedback_records(prompts, seed=0, fault_rate=rate)
        scores[rate] = [c.pop("overall_score") for record in records for c in record["completions"]]
        rest.append(records)
    assert rest[0] == rest[1] == rest[2]
    assert 10 not in scores[0.0]
    assert 1 not in scores[1.0]
    # every fault stores a 1 as 10, and a higher rate keeps the faults of a lower one
    for lower, higher in ((0.0, 0.5), (0.5, 1.0)):
        changed = [pair for pair in zip(scores[lower], scores[higher], strict=True) if pair[0] != pair[1]]
        assert len(changed) > 20
        assert set(changed) == {(1, 10)}


ASPECTS = {"instruction_following", "honesty", "truthfulness", "helpfulness"}


def test_ratings_are_high_for_right_answers_and_low_for_wrong_ones() -> None:
    prompt = "Sort these digits: 3914"
    answers = ["1349", "9431", "1348", "no idea", " ", ""]
    ratings = synthetic.rate(prompt, answers)
    assert len(ratings) == len(answers)
    for rating in ratings:
        assert set(rating) == ASPECTS
        assert all(type(number) is int and 1 <= number <= 5 for number in rating.values())
    means = [sum(rating.values()) / 4 for rating in ratings]
    assert means[0] >= 3.75  # 5, 4, 5, 5 less at most one each, where 5 cannot be passed
    assert all(mean <= 3.5 for mean in means[1:])  # 2, 4, 2, 2 and 3, 3, 1, 2 and at most one each
    assert means[4:] == [1.0, 1.0]


def test_a_rating_depends_on_prompt_and_answer_alone() -> None:
    prompt = "Write from low to high: 3914"
    first = synthetic.rate(prompt, ["1349", "9431", "12"])
    assert synthetic.rate(prompt, ["12", "\n1349 ", "9431"]) == [first[2], first[0], first[1]]
    assert synthetic.rate(prompt, []) == []


def test_the_critics_noise_is_that_of_the_records() -> None:
    (prompts,) = synthetic.make_prompts([2000], seed=0)
    given = []
    for prompt in prompts:
        (rating,) = synthetic.rate(prompt.instruction, [prompt.task.mistake(prompt.digits)])
        given.append(rating["truthfulness"])
    # 2 in three of five cases, 1 and 3 in one of five each
    assert set(given) == {1, 2, 3}
    assert given.count(2) / 2000 == pytest.approx(0.6, abs=0.05)
    assert given.count(3) / 2000 == pytest.approx(0.2, abs=0.04)


def test_the_critic_rates_its_own_prompts_alone() -> None:
    with pytest.raises(ValueError, match="knows no answer to 'Hello'"):
        synthetic.rate("Hello", ["Hi"])
