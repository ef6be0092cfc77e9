"""The suites' own correctness gates, and that they can turn red."""

import pytest
import torch

from bench import epochs, flops
from bench.runner import NAMES, RedGateError, Setting, check_gate

# The loaders' gate starts a tokeniser; start-up has nothing to compare.
GATES = [n for n in NAMES if n not in ("loader_wait", "growth", "startup")]


@pytest.mark.parametrize("name", GATES)
def test_the_gate_is_green(name):
    check_gate(name, Setting(quick=True))


def test_twenty_faithful_steps_equal_the_baseline():
    """Dropout 0, the same product rows, SGD 1e-3: losses of both stages to rtol 1e-3."""
    epochs.gate_faithful(Setting(), steps=20)


def test_faithful_mode_starts_as_the_baseline():
    """Fresh parameters of both have the same constants and the same spread, estimators' weights among them."""
    from bench.baselines import mimrl
    from engine.config import Config
    from engine.mimrl.model import build_model
    from engine.mimrl.names import split_reference_state
    from engine.mimrl.terms import mimrl_objective

    torch.manual_seed(0)
    width, shapes = 128, [(20, 3, 128), (10, 3, 128)]
    theirs = mimrl.MIMRL(mimrl.settings(time_len=40, d_hiddens=shapes, d_outs=shapes), torch.nn.Identity())
    settings = Config(
        mode="faithful", data={"time_len": 40}, model={"cubemlp": {"d_hiddens": shapes, "d_outs": shapes}}
    ).resolve()
    text = torch.nn.Identity()
    text.dim = 384
    model = build_model(settings, 5, 20, text)
    objective = mimrl_objective(settings.objective, model.fused_dim, width)
    ours = model.state_dict() | objective.estimator_state()
    expected = {k: v for part in split_reference_state(theirs.state_dict())[:2] for k, v in part.items()}
    assert set(ours) == set(expected)
    for name, fresh in expected.items():
        drawn = ours[name]
        if fresh.numel() > 1 and fresh.unique().numel() == 1:
            assert torch.equal(drawn, fresh), name
        elif fresh.numel() >= 100:
            assert drawn.std().item() == pytest.approx(fresh.std().item(), rel=0.2), name
        else:
            assert drawn.abs().max() > 0, name


def test_a_wrong_estimate_turns_the_gates_red(monkeypatch):
    from engine.mimrl.model import MIMRL
    from engine.model.output import ModelOutput

    forward = MIMRL.forward

    def wrong(self, batch):
        prediction, features = forward(self, batch)
        return ModelOutput(prediction, features | {"T": features["T"] * 1.01})

    monkeypatch.setattr(MIMRL, "forward", wrong)
    for name in ("epoch_fast", "epoch_faithful"):
        with pytest.raises(RedGateError, match="not close"):
            check_gate(name, Setting(quick=True))


def test_counted_flops_equal_torchs_own_count():
    """The formulas against torch's counter, on the eager parts without padding."""
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import BertConfig, BertModel

    from bench.baselines import mimrl

    def counted(run) -> int:
        with FlopCounterMode(display=False) as counter:
            run()
        return counter.get_total_flops()

    hidden, inner, tokens, rows = 32, 64, 12, 3
    encoder = BertModel(
        BertConfig(
            vocab_size=50, hidden_size=hidden, num_hidden_layers=2, num_attention_heads=2, intermediate_size=inner,
            attn_implementation="eager",
        ),
        add_pooling_layer=False,
    )  # fmt: skip
    ids = torch.randint(50, (rows, tokens))
    projection = 2 * rows * tokens * hidden * 16
    expected = flops.text_forward([tokens] * rows, 2, hidden, inner, 16) - projection
    assert counted(lambda: encoder(ids)) == expected

    shapes = ([10, 3, 16], [6, 3, 16], [4, 3, 16])
    hiddens = [[5, 3, 16], [4, 2, 16]]
    cube = mimrl.CubeMLP(shapes[0], hiddens, shapes[1:], [True, True], "gelu", True, False)
    x = torch.randn(rows, *shapes[0])
    assert counted(lambda: cube(x)) == flops.cube_forward(rows * 10 * 3, rows, shapes, hiddens)

    width, hidden, embed, batch = 8, 12, 6, 10
    c = mimrl.settings(critic_hidden=hidden, critic_embed=embed, cmi_embed_dim=width)
    a, b = torch.randn(batch, width, requires_grad=True), torch.randn(batch, width, requires_grad=True)
    estimator = mimrl.MIEstimator(width, width, c)
    products = flops.estimator_products(batch, width, hidden, embed)
    one = counted(lambda: estimator(a, b))
    both = counted(lambda: estimator(a, b)[1].backward())
    first = 2 * 2 * batch * width * hidden
    assert flops.MI_TERMS * one <= products["forward"]
    # forward + backward of a critic: three products a layer, whose input needs a gradient here
    assert both == 3 * one
    detached = counted(lambda: estimator(a.detach(), b.detach())[1].backward())
    assert detached == 3 * one - first
