import torch

from engine.mimrl.published import PublishedMIEstimator
from engine.model.estimators import Critic
from tests.golden.common import assert_grad, assert_values, cases, load, part


@cases("critic_")
def test_critic(name: str, info: dict):
    recorded = load(name)
    critic = PublishedMIEstimator(
        info["dx"],
        info["dy"],
        info["critic"],
        hidden=info["hidden_dim"],
        embed=info["embed_dim"],
        layers=info["layers"],
        activation=info["activation"],
    ).critic
    critic.load_state_dict({key.removeprefix("MLP_"): value for key, value in part(recorded, "param.").items()})
    x, y = recorded["x"].requires_grad_(), recorded["y"].requires_grad_()

    scores = critic(x, y)
    assert_values(scores, recorded["scores"], "scores")

    (scores * recorded["cotangent"]).sum().backward()
    assert_grad(x.grad, recorded["grad_x"], "grad_x")
    assert_grad(y.grad, recorded["grad_y"], "grad_y")
    gradients = {key: value.grad for key, value in critic.named_parameters()}
    for key, value in part(recorded, "grad.").items():
        assert_grad(gradients[key.removeprefix("MLP_")], value, key)


@cases("critic_concat")
def test_corrected_concat_is_the_transpose(name: str, info: dict):
    recorded = load(name)
    critic = Critic(
        info["dx"], info["dy"], "concat", info["hidden_dim"], info["embed_dim"], info["layers"], info["activation"]
    )
    critic.load_state_dict({key.removeprefix("MLP_"): value for key, value in part(recorded, "param.").items()})
    with torch.no_grad():
        assert_values(critic(recorded["x"], recorded["y"]).t(), recorded["scores"], "scores")
