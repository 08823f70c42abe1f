"""Samples of a prompt share its computation: equal to copies of it, of the right distribution, and resumable."""

import dataclasses
import itertools
import json

import pytest
import torch
import transformers
from decoded import generate
from ranks import run_ranks
from toys import toy_model, toy_tokenizer

from notus.data.chat import ChatEncoder
from notus.evaluation import decoding as generation
from notus.evaluation.decoding import Completion, Decoding, KeptTokens, generate_completions, generate_ids
from notus.evaluation.prompts import Prompt

PROMPTS = ["The quick brown fox jumps over the lazy dog", "a", "Write a poem about the sea", "12 + 30 ="]
DRAWN = Decoding(6, temperature=2.0, seed=5, batch_size=7, samples=3)  # batches of two prompts


def small(name, **settings):
    """A model of a family that `toy_model` does not have."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(vocab_size=400, bos_token_id=1, eos_token_id=2, **settings)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return model


TWO = {"hidden_size": 32, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48, "head_dim": 8}
MODELS = {
    "llama": lambda: toy_model("llama"),
    "sliding window, shorter than the prompts": lambda: toy_model(sliding_window=4),
    "learned positions": lambda: small("GPT2", n_embd=32, n_layer=2, n_head=4),
    "positions that begin at 2": lambda: toy_model("opt", ffn_dim=48, word_embed_proj_dim=32),
    "convolutions and attention": lambda: small("Lfm2", **TWO, **HEADS, layer_types=["conv", "full_attention"]),
    "windows and sinks": lambda: small(
        "GptOss", **TWO, **HEADS, num_local_experts=2, num_experts_per_tok=1, sliding_window=4
    ),
    "recurrent": lambda: small("Mamba", **TWO, state_size=4),  # its cache cannot be shared
}


def run(model, prompts, decoding, kept=None):
    """All that `generate_completions` says of the prompts, each a string."""
    given = [Prompt(f"prompt {number}", text) for number, text in enumerate(prompts)]
    return generate_completions(model, ChatEncoder(toy_tokenizer()), given, decoding, kept=kept)


def inputs_of(model):
    """The shapes of what the model computes from now on."""
    shapes = []
    model.register_forward_pre_hook(
        lambda module, args, given: shapes.append(given["input_ids"].shape), with_kwargs=True
    )
    return shapes


@pytest.mark.parametrize("kind", MODELS)
def test_greedy_samples_are_plain_completions(kind, capsys):
    model = MODELS[kind]()
    plain = run(model, PROMPTS, Decoding(8)).completions
    for batch_size in (1, 5, 32):
        found = run(model, PROMPTS, Decoding(8, samples=3, batch_size=batch_size)).completions
        assert found == [of_prompt * 3 for of_prompt in plain]
    assert len({tuple(of_prompt[0].ids) for of_prompt in plain}) == 4
    said = capsys.readouterr().out.splitlines()
    assert len(said) == (3 if kind == "recurrent" else 0)
    assert all(line.startswith("MambaForCausalLM's cache cannot be shared, so each sample computes") for line in said)


def test_a_prompt_is_computed_once():
    model, tokenizer = toy_model(), toy_tokenizer()
    widths = [len(tokenizer(prompt).input_ids) for prompt in PROMPTS]
    shapes = inputs_of(model)
    assert generation._can_share(model, [[5, 6, 7, 8], [9, 10]], 0)
    tried = len(shapes)
    run(model, PROMPTS, dataclasses.replace(DRAWN, max_new_tokens=3, batch_size=12))
    rows = 12
    # the prompts without their last tokens, then three tokens of each sample
    assert shapes[2 * tried :] == [(4, max(widths) - 1), (rows, 1), (rows, 1), (rows, 1)]


def test_draws_are_those_of_copies_of_the_prompt():
    model = toy_model(scale=1.5)
    copies = run(
        model, [prompt for prompt in PROMPTS for _ in range(3)], dataclasses.replace(DRAWN, samples=1, batch_size=12)
    )
    samples = run(model, PROMPTS, dataclasses.replace(DRAWN, batch_size=12))
    assert [completion for (completion,) in copies.completions] == list(itertools.chain(*samples.completions))
    texts = [{completion.text for completion in of_prompt} for of_prompt in samples.completions]
    assert [len(of_prompt) for of_prompt in texts] == [3] * 4  # different rows draw different numbers
    assert run(model, PROMPTS, DRAWN).completions == run(model, PROMPTS, DRAWN).completions
    other = run(model, PROMPTS, dataclasses.replace(DRAWN, seed=6))
    assert other.completions != run(model, PROMPTS, DRAWN).completions


class TwoTokens(torch.nn.Module):
    """In the place of a model's head: token 5 has probability 1/4 and token 6 has 3/4, and no other any."""

    def forward(self, hidden):
        logits = torch.full((*hidden.shape[:-1], 400), -torch.inf)
        logits[..., 5], logits[..., 6] = 0.0, torch.tensor(3.0).log()
        return logits


@pytest.mark.parametrize("engine", ["batched", pytest.param("continuous", marks=pytest.mark.slow)])
def test_samples_are_drawn_independently_with_the_models_probabilities(engine, monkeypatch):
    """Two tokens of 200 samples of two prompts: 400 draws of four outcomes, 1/16, 3/16, 3/16 and 9/16."""
    model = toy_model()
    model.lm_head = TwoTokens()
    monkeypatch.setattr(generation, "_can_share", lambda *args: True)  # infinite logits have no spread
    monkeypatch.setattr(generation, "_check_continuous", lambda *args: None)
    drawing = Decoding(temperature=1.0, seed=3, batch_size=50, samples=200, engine=engine)
    drawn = generate_ids(model, toy_tokenizer(), [[1, 7, 8], [1, 9]], [2, 2], drawing)
    assert len(drawn) == 400
    wanted = {(5, 5): 25, (5, 6): 75, (6, 5): 75, (6, 6): 225}
    counts = {outcome: sum(tuple(ids) == outcome for ids in drawn) for outcome in wanted}
    assert sum(counts.values()) == 400
    chi_square = sum((counts[outcome] - mean) ** 2 / mean for outcome, mean in wanted.items())
    assert chi_square < 16.3  # three degrees of freedom: a share of 0.001 lies above
    # batches draw other numbers: the first fifty samples are not the next fifty
    assert drawn[:50] != drawn[50:100]
    assert drawn[:200] != drawn[200:]


def counting(model, ends_at):
    """Let `model` say 10, 11, 12, ... after any prompt, and its end as the new token `ends_at` (from 0)."""
    tokens = [10 + number for number in range(ends_at)] + [2] + [30] * 20
    forward = model.forward

    def counted(*args, **given):
        output = forward(*args, **given)
        output.logits = torch.zeros_like(output.logits)
        output.logits[..., tokens[min(counted.step, 20)]] = 9.0
        counted.step += 1
        return output

    counted.step = 0
    model.forward = counted
    return counted


@pytest.mark.parametrize(
    ("ends_at", "finish_reason", "ids", "tokens"),
    [
        (2, "stop", [10, 11], 3),  # with one token to spare
        (3, "stop", [10, 11, 12], 4),  # the end is the last token that there is room for
        (4, "length", [10, 11, 12, 13], 4),  # the end would have been the next
    ],
)
def test_an_end_at_the_limit_is_told_from_a_cut(tmp_path, ends_at, finish_reason, ids, tokens):
    model = toy_model()
    counted = counting(model, ends_at)
    kept = KeptTokens(tmp_path, "model")
    wanted = [[Completion(toy_tokenizer().decode(ids), ids, finish_reason, tokens)]]
    found = run(model, ["a"], Decoding(4), kept)
    assert found.completions == wanted
    assert found.tokens == tokens
    assert found.tokens_per_second > 0
    steps = counted.step
    again = run(model, ["a"], Decoding(4), kept)
    assert (again.completions, again.tokens, again.tokens_per_second) == (wanted, 0, None)
    assert counted.step == steps  # all were found
    counted.step = 0
    end = [2] if finish_reason == "stop" else []
    assert generate_ids(model, toy_tokenizer(), [[1, 69]], [4], Decoding(4), with_end=True) == [ids + end]


def test_what_an_earlier_version_kept_is_computed_again(tmp_path):
    """It does not say how a completion ended."""
    (tmp_path / "rank-0.jsonl").write_text('{"key": "0a", "ids": [5, 6]}\n')
    assert run(toy_model(), ["a"], Decoding(4), KeptTokens(tmp_path, "model")).tokens > 0
    (tmp_path / "rank-0.jsonl").write_text('{"key": "0a", "ids": [5, 6], "end": null, "finish_reason": "cut"}\n')
    with pytest.raises(ValueError, match=r"rank-0.jsonl, line 1: not a kept completion"):
        run(toy_model(), ["a"], Decoding(4), KeptTokens(tmp_path, "model"))


def test_a_string_that_stops_is_no_cut():
    row = generation._ended
    assert row([10, 11, 2, 2], 4, [2], None) == generation.Row([10, 11], 2, "stop")
    assert row([10, 11, 12, 0], 4, [2], 3) == generation.Row([10, 11, 12], None, "stop")
    assert row([10, 11, 2, 0], 4, [2], 3) == generation.Row([10, 11], 2, "stop")  # the end token is such a string
    assert row([10, 11, 12, 13, 2], 4, [2], 5) == generation.Row([10, 11, 12, 13], None, "length")
    assert row([10, 11, 12], 2, [2], 3) == generation.Row([10, 11], None, "length")


def test_rooms_of_their_own():
    """The context cuts a long prompt's samples before a short one's."""
    model = toy_model(max_position_embeddings=20)
    found = run(model, PROMPTS[:2], Decoding(12, temperature=2.0, samples=2)).completions
    room = 20 - len(toy_tokenizer()(PROMPTS[0]).input_ids)
    assert 0 < room < 12
    assert [(completion.tokens, completion.finish_reason) for completion in found[0]] == [(room, "length")] * 2
    assert all(completion.tokens <= 12 for completion in found[1])


class Killed(BaseException):
    pass


CONTINUOUS = dataclasses.replace(DRAWN, engine="continuous", batch_size=2)
ENGINES = [pytest.param(DRAWN, id="batched"), pytest.param(CONTINUOUS, id="continuous", marks=pytest.mark.slow)]


@pytest.mark.parametrize("decoding", ENGINES)
def test_a_killed_call_resumes_to_the_same_samples(tmp_path, monkeypatch, decoding):
    model = toy_model(scale=1.5)
    wanted = run(model, PROMPTS, decoding).completions
    complete, batches = generation._Engine.complete, []

    def dying(self, batch, on_done):
        if len(batches) == 1:
            raise Killed
        batches.append(batch)
        return complete(self, batch, on_done)

    with monkeypatch.context() as patch:
        patch.setattr(generation._Engine, "complete", dying)
        with pytest.raises(Killed):
            run(model, PROMPTS, decoding, KeptTokens(tmp_path, "model"))
    done = len(batches[0].places)
    assert 0 < done < 12
    lines = [json.loads(line) for line in (tmp_path / "rank-0.jsonl").read_text().splitlines()]
    assert len(lines) == done
    found = run(model, PROMPTS, decoding, KeptTokens(tmp_path, "model"))
    assert found.completions == wanted
    total = sum(completion.tokens for completion in itertools.chain(*wanted))
    assert found.tokens == total - sum(len(line["ids"]) + (line["end"] is not None) for line in lines)


def on_two_ranks(reached, decoding):
    found = run(toy_model(scale=1.5), PROMPTS, decoding)
    ids = [[row.ids for row in of_prompt] for of_prompt in found.completions]
    (reached / f"{torch.distributed.get_rank()}.json").write_text(json.dumps([found.tokens, ids]))


@pytest.mark.parametrize("decoding", ENGINES)
def test_two_ranks_draw_what_one_draws(tmp_path, decoding):
    run_ranks(on_two_ranks, 2, tmp_path, tmp_path, decoding)
    alone = run(toy_model(scale=1.5), PROMPTS, decoding)
    wanted = [alone.tokens, [[row.ids for row in of_prompt] for of_prompt in alone.completions]]
    assert [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)] == [wanted] * 2


def test_a_state_outside_of_the_cache_is_noticed(capsys):
    """A model that adds up what it saw, in an attribute: rows that share a prompt would not have seen it."""
    model = toy_model()
    forward = model.forward

    def remembering(*args, **given):
        output = forward(*args, **given)
        seen = given["input_ids"].float().sum(1, keepdim=True)
        if given["input_ids"].shape[1] == 1 and len(seen) == len(remembering.seen):
            seen = remembering.seen + seen
        remembering.seen = seen
        output.logits = output.logits + seen[:, :, None] * torch.linspace(-1, 1, 400)
        return output

    remembering.seen = torch.zeros(0, 1)
    model.forward = remembering
    assert not generation._can_share(model, [[5, 6, 7, 8], [9, 10]], 0)
    assert (
        "MistralForCausalLM's cache cannot be shared, so each sample computes its prompt again: its logits would"
        in (capsys.readouterr().out)
    )


def test_continuous_batching_is_plain_generation_and_leaves_the_model_as_it_was():
    model = MODELS["windows and sinks"]()
    attention, state = model.config._attn_implementation, torch.get_rng_state()
    wanted = run(model, PROMPTS, Decoding(8)).completions
    found = run(model, PROMPTS, Decoding(8, samples=2, batch_size=3, engine="continuous")).completions
    assert found == [of_prompt * 2 for of_prompt in wanted]
    assert model.config._attn_implementation == attention
    assert torch.equal(torch.get_rng_state(), state)
    assert run(model, PROMPTS, Decoding(8)).completions == wanted


def test_continuous_batching_of_a_model_that_it_computes_otherwise_is_an_error(monkeypatch):
    model = toy_model()
    forward = model.forward

    def paged(*args, **given):
        output = forward(*args, **given)
        if "past_key_values" not in given or len(given["input_ids"]) == 1:  # all requests stand in one row
            output.logits = output.logits.roll(1, dims=-1)
        return output

    model.forward = paged
    with pytest.raises(
        ValueError, match=r"continuous batching does not work for MistralForCausalLM .*--engine batched"
    ):
        run(model, PROMPTS, Decoding(4, engine="continuous"))
    with pytest.raises(ValueError, match=r"continuous batching does not work for MambaForCausalLM .*--engine batched"):
        run(MODELS["recurrent"](), PROMPTS, Decoding(4, engine="continuous"))


def test_texts_come_one_prompt_after_the_other():
    model = toy_model(scale=1.5)
    options = {"max_new_tokens": 6, "temperature": 2.0, "seed": 5, "batch_size": 7}
    texts = [[completion.text for completion in of_prompt] for of_prompt in run(model, PROMPTS, DRAWN).completions]
    assert generate(model, toy_tokenizer(), PROMPTS, samples=3, **options) == list(itertools.chain(*texts))


def test_a_prompt_that_nearly_fills_the_context_is_completed_beside_a_short_one():
    """Its row has used up its room while the other goes on, and learned positions end with the context."""
    model = small("GPT2", n_embd=32, n_layer=2, n_head=4, n_positions=64)
    prompts, decoding = [PROMPTS[0], PROMPTS[1]], Decoding(60)
    together = run(model, prompts, decoding).completions
    assert [row[0].finish_reason for row in together] == ["length", "length"]
    assert together[0][0].tokens < together[1][0].tokens == 60
    assert together == [run(model, [prompt], decoding).completions[0] for prompt in prompts]
