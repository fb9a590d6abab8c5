"""Choosing the next token, against a slow twin."""

import pytest
import torch

from traces.errors import UserError
from validate.sampling import Sampling

LOGITS = torch.tensor([1.0, 3.0, -2.0, 3.0, 0.5, 2.0])


def naive_probabilities(logits, temperature, top_p):
    """Divide, exponentiate, take likely tokens until their sum reaches top_p, renormalise."""
    weights = [2.718281828459045 ** (float(logit) / temperature) for logit in logits]
    shares = [weight / sum(weights) for weight in weights]
    nucleus, total = [], 0.0
    for token in sorted(range(len(shares)), key=lambda token: (-shares[token], token)):
        if total >= top_p:
            break
        nucleus.append(token)
        total += shares[token]
    return [shares[token] / total if token in nucleus else 0.0 for token in range(len(shares))]


def drawn_shares(sampling, n_draws=4000):
    generator = sampling.generator()
    draws = [sampling.choose(LOGITS, generator) for _ in range(n_draws)]
    return [draws.count(token) / n_draws for token in range(len(LOGITS))]


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.6])
def test_draws_follow_temperature_and_nucleus(temperature, top_p):
    shares = drawn_shares(Sampling(True, temperature, top_p, seed=3))
    expected = naive_probabilities(LOGITS, temperature, top_p)
    assert [share > 0 for share in shares] == [share > 0 for share in expected]
    assert shares == pytest.approx(expected, abs=0.03)


def test_greedy_takes_the_first_of_equals():
    assert Sampling().choose(LOGITS, Sampling().generator()) == 1


def test_a_tiny_nucleus_is_greedy():
    sampling = Sampling(True, 1.0, 1e-6, seed=5)
    assert {sampling.choose(LOGITS, sampling.generator()) for _ in range(20)} == {1}


def test_same_seed_same_draws():
    assert drawn_shares(Sampling(True, seed=1), 50) == drawn_shares(Sampling(True, seed=1), 50)
    assert drawn_shares(Sampling(True, seed=1), 50) != drawn_shares(Sampling(True, seed=2), 50)


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.0},
        {"temperature": -1.0},
        {"temperature": float("inf")},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": float("nan")},
        {"seed": -1},
        {"seed": 2**63},
    ],
)
def test_settings_out_of_range_are_refused(settings):
    (name,) = settings
    with pytest.raises(UserError, match=f"{name} is"):
        Sampling(do_sample=True, **settings)


def test_only_settings_with_an_effect_are_stated():
    assert Sampling(temperature=2.0).as_fields() == {"do_sample": False}
    assert Sampling(True, 2.0, 0.5).as_fields() == {"do_sample": True, "temperature": 2.0, "top_p": 0.5}
