"""What a run's settings say of its loss: rows, reference, per token, options, papers."""

import pytest

from notus.evaluation.run_loss import read_loss


def loss_of(loss_type="sigmoid", **dpo):
    found = read_loss({"dpo": {"beta": 0.1, "loss_type": loss_type, **dpo}}, "run")
    assert found is not None
    return found


def test_one_loss_and_a_sum():
    assert loss_of().name == "sigmoid"
    assert loss_of({"sigmoid": 0.8, "bco_pair": 0.2}).name == "0.8 sigmoid + 0.2 bco_pair"
    assert loss_of({"sigmoid": 2}).name == "2 sigmoid"
    assert read_loss({"model": {}}, "run") is None


@pytest.mark.parametrize(
    ("loss_type", "rows", "reference", "per_token"),
    [
        ("sigmoid", "pairs", True, False),
        ("ipo", "pairs", True, False),  # its rewards are β times the whole log-ratio
        ("simpo", "pairs", False, True),
        ("cpo", "pairs", False, False),
        ({"simpo": 1.0, "cpo": 1.0}, "pairs", False, True),
        ({"cpo": 1.0, "simpo": 1.0}, "pairs", False, False),  # rewards are those of the first
        ({"cpo": 1.0, "sigmoid": 1.0}, "pairs", True, False),
        ("plackett_luce", "lists", True, False),
        ("kto", "labels", True, False),
    ],
)
def test_what_its_rewards_are(loss_type, rows, reference, per_token):
    found = loss_of(loss_type)
    assert (found.rows, found.reference, found.per_token) == (rows, reference, per_token)


def test_options_are_those_that_do_something():
    assert loss_of().options == {}
    assert loss_of(label_smoothing=0.1).options == {"label_smoothing": 0.1}
    assert loss_of(options={"f_divergence": "js_divergence"}).options == {"f_divergence": "js_divergence"}
    assert set(loss_of("discopop").options) == {"discopop_tau"}
    assert loss_of("discopop", options={"discopop_tau": 0.5}).options == {"discopop_tau": 0.5}


def test_papers_are_cited_once():
    assert loss_of().papers == ["2305.18290"]
    assert loss_of("hinge").papers == ["2305.18290", "2309.06657", "2305.10425"]
    assert loss_of({"nca_pair": 1.0, "exo_pair": 1.0}, label_smoothing=0.1).papers == [
        "2305.18290",
        "2402.05369",
        "2402.00856",
    ]


def test_an_unknown_loss_names_the_run():
    with pytest.raises(ValueError, match="runs/x: loss_type 'sigmoidal' does not exist; did you mean"):
        read_loss({"dpo": {"loss_type": "sigmoidal"}}, "runs/x")
