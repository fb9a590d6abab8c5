"""Choosing the next token, against a slow twin."""

from fractions import Fraction

import pytest
import torch

from traces.errors import UserError
from validate.models import next_token as sampling_module
from validate.models.next_token import Sampling, choose_tokens

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


@pytest.mark.slow
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


# Whole batches --------------------------------------------------------------------------------------------

MIXED = [
    Sampling(True, 0.6, 0.95, seed=1),
    Sampling(),
    Sampling(True, 1.7, 1.0, seed=2),
    Sampling(True, 1.0, 0.3, seed=3),
    Sampling(True, 3.0, 0.999, seed=4),
]


def many_logits(n_rows=5, n_tokens=700, seed=0, dtype=torch.float32):
    """Give logits of which many are equal, so that their order matters."""
    logits = torch.randn(n_rows, n_tokens, generator=torch.Generator().manual_seed(seed)) * 2
    return (logits * 4).round().div(4).to(dtype)


def naive_choice(logits, sampling, generator):
    """Walk down the likeliest tokens, one by one, with exact fractions."""
    if not sampling.do_sample:
        return logits.tolist().index(max(logits.tolist()))
    uniform = Fraction(float(torch.rand((), dtype=torch.float64, generator=generator)))
    shares = torch.softmax(logits.float() / sampling.temperature, -1).tolist()
    order = sorted(range(len(shares)), key=lambda token: (-shares[token], token))
    nucleus, total = [], Fraction(0)
    for token in order:
        if sampling.top_p < 1 and total >= Fraction(sampling.top_p):
            break
        nucleus.append(token)
        total += Fraction(shares[token])
    reached = Fraction(0)
    for token in nucleus:
        reached += Fraction(shares[token])
        if reached > uniform * total:
            return token
    raise AssertionError("the last token of a nucleus reaches its total")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_batch_draws_what_a_walk_down_its_rows_draws(dtype):
    generators, twins = ([own.generator() for own in MIXED] for _ in range(2))
    drawn = set()
    for step in range(60):
        logits = many_logits(seed=step, dtype=dtype)
        found = choose_tokens(logits, MIXED, generators)
        assert found == [naive_choice(*row) for row in zip(logits, MIXED, twins, strict=True)]
        drawn |= set(found)
    assert len(drawn) > 100


@pytest.mark.parametrize("top_p", [0.3, 0.95, 0.999])
def test_tokens_outside_a_nucleus_need_no_order(monkeypatch, top_p):
    samplings = [Sampling(True, 0.6, top_p, seed=seed) for seed in range(5)]
    generators, twins = ([own.generator() for own in samplings] for _ in range(2))
    sizes, whole = [], sampling_module._likeliest
    monkeypatch.setattr(
        sampling_module,
        "_likeliest",
        lambda *given: (found := whole(*given), sizes.append(found[1].shape[1]))[0],
    )
    for step in range(20):
        logits = many_logits(seed=step) * 4
        expected = [naive_choice(*row) for row in zip(logits, samplings, twins, strict=True)]
        assert choose_tokens(logits, samplings, generators) == expected
    assert max(sizes) < 700 // 8
    logits[1, 3] = torch.nan
    with pytest.raises(UserError, match="a value that is no number"):
        choose_tokens(logits[1:2], samplings[:1], generators[:1])


@pytest.mark.parametrize("most_at_once", [1, 700, 1400, 10**6])
def test_a_row_draws_the_same_alone_and_however_a_batch_is_cut(monkeypatch, most_at_once):
    monkeypatch.setattr(sampling_module, "_MOST_AT_ONCE", most_at_once)
    together, alone = ([own.generator() for own in MIXED] for _ in range(2))
    for step in range(20):
        logits = many_logits(seed=step)
        expected = [own.choose(*row) for own, *row in zip(MIXED, logits, alone, strict=True)]
        assert choose_tokens(logits, MIXED, together) == expected


def test_a_greedy_row_draws_nothing():
    generator = Sampling().generator()
    before = generator.get_state()
    sampled = Sampling(True).generator()
    choose_tokens(many_logits(2), [Sampling(), Sampling(True)], [generator, sampled])
    assert torch.equal(generator.get_state(), before)
    assert not torch.equal(sampled.get_state(), before)


def test_the_last_token_of_a_nucleus_is_the_last_that_is_drawn(monkeypatch):
    monkeypatch.setattr(sampling_module, "_uniform", lambda generator: 1 - 2**-53)
    logits = torch.tensor([[1.0, 3.0, -torch.inf, 3.0, 0.5, 2.0]])
    for top_p, last in ((1e-300, 1), (0.3, 1), (0.5, 3), (0.9, 5), (1.0, 4)):
        assert choose_tokens(logits, [Sampling(True, 1.0, top_p)], [torch.Generator()]) == [last]


def test_logits_that_are_no_numbers_are_refused():
    logits = many_logits(2)
    logits[1, 3] = torch.nan
    samplings = [Sampling(True), Sampling(True)]
    with pytest.raises(UserError, match="a value that is no number"):
        choose_tokens(logits, samplings, [own.generator() for own in samplings])
