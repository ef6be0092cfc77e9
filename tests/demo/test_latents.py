import numpy as np
import pytest

from engine.demo.latents import (
    CMI_TERMS,
    INDEX,
    MI_TERMS,
    LatentModel,
    conditional_information,
    split_name,
    true_information,
)
from engine.errors import ConfigError


def log_density(x: np.ndarray, sigma: np.ndarray) -> np.ndarray:
    """log N(x; 0, sigma), written out anew: the closed form under test goes through determinants of blocks only."""
    if x.shape[1] == 0:
        return np.zeros(len(x))
    whitened = np.linalg.solve(np.linalg.cholesky(sigma), x.T)
    return -0.5 * ((whitened**2).sum(0) + np.log(np.linalg.eigvalsh(2 * np.pi * sigma)).sum())


@pytest.mark.parametrize("name", MI_TERMS + CMI_TERMS)
@pytest.mark.parametrize("model", [LatentModel(), LatentModel(0.3, 0.8, (0.2, 0.7, 0.6, -0.1, 0.5))])
def test_closed_form_equals_monte_carlo(name, model):
    """I(X;Y|Z) = E[log p(x,y,z) p(z) / p(x,z) p(y,z)], over 100,000 draws, within 4 standard errors."""
    drawn = model.sample(100_000, np.random.default_rng(5))
    joint = np.concatenate([drawn[k] for k in "TAVC"], axis=1)
    # the sample's own second moments agree with the covariance that the closed form uses
    assert np.abs(joint.T @ joint / len(joint) - model.covariance()).max() < 0.02

    def density(columns):
        return log_density(joint[:, columns], model.covariance()[np.ix_(columns, columns)])

    x, y, given = split_name(name)
    x, y, z = INDEX[x], INDEX[y], INDEX[given] if given else []
    ratio = density(x + y + z) + density(z) - density(x + z) - density(y + z)
    error = ratio.std() / np.sqrt(len(ratio))
    assert abs(ratio.mean() - true_information(model)[name]) < 4 * error


def test_scalar_gaussian_formula():
    sigma = np.array([[1, 0.75], [0.75, 1]])
    assert conditional_information(sigma, [0], [1]) == pytest.approx(-0.5 * np.log(1 - 0.75**2))


def test_markov_chain():
    """X -> Y -> Z with unit steps: I(X;Y|Z) = .14384 and I(X;Z|Y) = 0."""
    sigma = np.array([[1, 1, 1], [1, 2, 2], [1, 2, 3]], float)
    assert conditional_information(sigma, [0], [1], [2]) == pytest.approx(0.14384, abs=1e-5)
    assert conditional_information(sigma, [0], [2], [1]) == pytest.approx(0, abs=1e-12)


def test_chain_rule_ties_the_terms_together():
    """I(T;A) + I(T;C|A) = I(T;C) + I(T;A|C): both are I(T;A,C)."""
    true, sigma = true_information(), LatentModel().covariance()
    for m in "AV":
        both = conditional_information(sigma, INDEX["T"], INDEX[m] + INDEX["C"])
        label = conditional_information(sigma, INDEX["T"], INDEX["C"])
        assert true[f"I(T;{m})"] + true[f"I(T;C|{m})"] == pytest.approx(both)
        assert label + true[f"I(T;{m}|C)"] == pytest.approx(both)


def test_each_factor_does_what_it_is_for():
    none = true_information(LatentModel(shared=0, arousal=0))
    assert none["I(T;A)"] == pytest.approx(0, abs=1e-12)
    assert none["I(T;A|C)"] > 0.05  # only the label ties them: purely complementary
    no_audio = true_information(LatentModel(shared=0, label=(0.5, 0.6, 0.0, 0.4, 0.2)))
    assert no_audio["I(A;C|T)"] == pytest.approx(0, abs=1e-12)
    assert true_information()["I(A;C|T)"] > 0.2  # sarcasm says what the words do not


def test_expected_label_is_the_regression():
    model = LatentModel()
    drawn = model.sample(100_000, np.random.default_rng(1))
    c = drawn["C"][:, 0]
    x = np.concatenate([drawn["T"], drawn["A"]], axis=1)
    fitted = x @ np.linalg.lstsq(x, c, rcond=None)[0]
    assert np.abs(fitted - model.expected_label(drawn, "TA")).max() < 0.1


@pytest.mark.parametrize(
    "model", [LatentModel(shared=1.0), LatentModel(arousal=-0.1), LatentModel(label=(1, 1, 1, 1, 0))]
)
def test_infinite_information_is_refused(model):
    with pytest.raises(ConfigError, match="infinite"):
        true_information(model)
