"""MIMRL written the obvious way in eager PyTorch: the yardstick of every ratio, and a second opinion on correctness.

It shares nothing with `engine/`. It does what the published code does, wastes included: text padded to `time_len`, a
full backward through the encoders in stage 1 whose gradients are thrown away, one module a critic, `B²` pairs for the
concat critic, nearest neighbours by scikit-learn on the host with Python loops over the bank, the conditional
classifier run twice, banks that keep their graphs until used. Nobody may slow it down: tests/golden pins its numbers.
"""

from __future__ import annotations

import copy
import itertools
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.neighbors import NearestNeighbors
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

MI_PAIRS = ["f_t", "f_a", "f_v", "t_a", "t_v"]
CMI_TRIPLES = ["ac_t", "ta_c", "vc_t", "tv_c", "tc_a", "tc_v"]
ACTIVATIONS = {
    "elu": nn.ELU, "gelu": nn.GELU, "hardshrink": nn.Hardshrink, "hardtanh": nn.Hardtanh, "leakyrelu": nn.LeakyReLU,
    "prelu": nn.PReLU, "relu": nn.ReLU, "rrelu": nn.RReLU, "tanh": nn.Tanh,
}  # fmt: skip

FLAGSHIP = {
    "d_in": [384, 5, 20], "time_len": 100, "d_common": 128, "encoder": "gru", "activate": "gelu", "bias": True,
    "ln_first": False, "res_project": [True, True],
    "d_hiddens": [[50, 3, 128], [10, 3, 128]], "d_outs": [[50, 3, 128], [10, 3, 128]],
    "compose_t": "mean", "compose_k": "mean", "critic": "separate", "bound": "infonce", "baseline": "constant",
    "critic_hidden": 256, "critic_embed": 128, "cmi_embed_dim": 128, "alpha_logit": 0.01, "smile_clip": 1.0,
    "k_neighbor": 2, "cmi_last_activate": "sigmoid", "dropout": [0.1, 0.1, 0.1, 0.1],
}  # fmt: skip


# -- CubeMLP ---------------------------------------------------------------------------------------


class AxisMLP(nn.Module):
    def __init__(self, d_in, d_hidden, d_out, activate, bias):
        super().__init__()
        self.fc1 = nn.Linear(d_in, d_hidden, bias=bias)
        self.act = ACTIVATIONS[activate]()
        self.fc2 = nn.Linear(d_hidden, d_out, bias=bias)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class CubeBlock(nn.Module):
    def __init__(self, d_in, d_hidden, d_out, res_project, activate, bias, ln_first):
        super().__init__()
        self.ln_first, self.res_project = ln_first, res_project
        for name, i, h, o in zip("lkd", d_in, d_hidden, d_out, strict=True):
            setattr(self, f"mlp_{name}", AxisMLP(i, h, o, activate, bias))
            setattr(self, f"ln_{name}", nn.LayerNorm(i if ln_first else o, eps=1e-6))
            if res_project:
                setattr(self, f"res_projection_{name}", nn.Linear(i, o, bias=False))

    def mix(self, x, name):
        norm = getattr(self, f"ln_{name}")
        residual = getattr(self, f"res_projection_{name}")(x) if self.res_project else x
        y = getattr(self, f"mlp_{name}")(norm(x) if self.ln_first else x) + residual
        return y if self.ln_first else norm(y)

    def forward(self, x):  # [B, L, K, D]
        x = self.mix(x.permute(0, 2, 3, 1), "l").permute(0, 3, 1, 2)
        x = self.mix(x.permute(0, 1, 3, 2), "k").permute(0, 1, 3, 2)
        return self.mix(x, "d")


class CubeMLP(nn.Module):
    def __init__(self, d_in, d_hiddens, d_outs, res_project, activate, bias, ln_first):
        super().__init__()
        self.layers_stack = nn.ModuleList()
        for hidden, out, project in zip(d_hiddens, d_outs, res_project, strict=True):
            self.layers_stack.append(CubeBlock(d_in, hidden, out, project, activate, bias, ln_first))
            d_in = out

    def forward(self, x):
        for block in self.layers_stack:
            x = block(x)
        return x


# -- estimators ------------------------------------------------------------------------------------


def relu_mlp(d_in, hidden, d_out, layers=2, zero_bias=True):
    sizes = [d_in] + [hidden] * (layers + 1)
    stack = []
    for a, b in itertools.pairwise(sizes):
        stack += [nn.Linear(a, b), nn.ReLU()]
    net = nn.Sequential(*stack, nn.Linear(hidden, d_out))
    for layer in net:
        if zero_bias and isinstance(layer, nn.Linear):
            nn.init.zeros_(layer.bias)
    return net


class SeparateCritic(nn.Module):
    def __init__(self, dx, dy, hidden, embed):
        super().__init__()
        self.MLP_g, self.MLP_h = relu_mlp(dx, hidden, embed), relu_mlp(dy, hidden, embed)

    def forward(self, x, y):
        return self.MLP_h(y) @ self.MLP_g(x).t()


class ConcatCritic(nn.Module):
    def __init__(self, dx, dy, hidden, embed):
        super().__init__()
        self.MLP_f = relu_mlp(dx + dy, hidden, 1)

    def forward(self, x, y):
        n = len(x)
        pairs = torch.cat([x[None].expand(n, n, -1), y[:, None].expand(n, n, -1)], dim=2).reshape(n * n, -1)
        return self.MLP_f(pairs).reshape(n, n).t()


class MLPBaseline(nn.Module):
    def __init__(self, d, hidden):
        super().__init__()
        self.MLP = relu_mlp(d, hidden, 1)

    def forward(self, y):
        return self.MLP(y)


def off_diagonal_logmeanexp(s):
    n = len(s)
    return torch.logsumexp(s - torch.diag(torch.full((n,), torch.inf)), dim=(0, 1)) - np.log(n * (n - 1.0))


def tuba(s, a):
    s = s - a if a is not None else s
    return 1 + s.diag().mean() - off_diagonal_logmeanexp(s).exp()


def js_fgan(s):
    n = len(s)
    f = -F.softplus(-s.diag()).mean()
    return f - (F.softplus(s).sum() - F.softplus(s.diag()).sum()) / (n * (n - 1.0))


def interpolate(s, a, alpha_logit):
    n = len(s)
    total = torch.logsumexp(s, 1, keepdim=True)
    d = total - s
    d = torch.where(d == 0, torch.ones_like(d), d)
    loo = s + torch.log(torch.expm1(d)) - np.log(n - 1.0)
    logit = torch.tensor(alpha_logit)
    mixed = torch.logsumexp(torch.stack([F.logsigmoid(logit) + loo, F.logsigmoid(-logit) + a.expand(n, n)]), 0)
    off = ~torch.eye(n, dtype=torch.bool)
    joint = s.diag().mean() - mixed[off].mean()
    return 1 + joint - (s - mixed.diag()[None, :])[off].exp().mean()


def bound_value(name, s, a, alpha_logit, smile_clip):
    n = len(s)
    if name in ("dv", "mine"):
        return s.diag().mean() - off_diagonal_logmeanexp(s)
    if name == "nwj":
        return tuba(s - 1, None)
    if name == "tuba":
        return tuba(s, a)
    if name == "infonce":
        return np.log(n) + (s.diag() - torch.logsumexp(s, 1)).mean()
    if name == "js_fgan":
        return js_fgan(s)
    if name == "js":
        return js_fgan(s) + (tuba(s - 1, None) - js_fgan(s)).detach()
    if name == "smile":
        clipped = torch.clamp(s, -smile_clip, smile_clip)
        dv = s.diag().mean() - off_diagonal_logmeanexp(clipped)
        return js_fgan(s) + (dv - js_fgan(s)).detach()
    return interpolate(s, a, alpha_logit)


class MIEstimator(nn.Module):
    def __init__(self, dx, dy, c):
        super().__init__()
        critic = SeparateCritic if c.critic == "separate" else ConcatCritic
        self.critic_model = critic(dx, dy, c.critic_hidden, c.critic_embed)
        if c.baseline == "unnormalized":
            self.baseline_model = MLPBaseline(dy, c.critic_hidden)
        self.c = c

    def forward(self, x, y):
        s = self.critic_model(x, y)
        a = torch.zeros(len(y), 1)
        if self.c.baseline == "unnormalized":
            a = self.baseline_model(y)
        elif self.c.baseline != "constant":
            a = torch.distributions.Normal(0.0, 1.0).log_prob(y).sum(1, keepdim=True)
        mi = bound_value(self.c.bound, s, a, self.c.alpha_logit, self.c.smile_clip)
        return mi, -mi


class CMIClassifier(nn.Module):
    def __init__(self, dim, hidden, last_activate):
        super().__init__()
        self.mlp = relu_mlp(3 * dim, hidden, 2, zero_bias=False)
        self.last = nn.Sigmoid() if last_activate == "sigmoid" else nn.Hardtanh(1e-4, 1 - 1e-4)

    def forward(self, rows):
        return self.last(self.mlp(rows).clamp(-10, 10))


class CMIEstimator(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.classifier = CMIClassifier(c.cmi_embed_dim, c.critic_hidden, c.cmi_last_activate)
        self.dim, self.k = c.cmi_embed_dim, c.k_neighbor

    def rows(self, x, y, z):
        return torch.cat([v.repeat(1, self.dim // v.shape[1]) for v in (x, y, z)], dim=1)

    def forward(self, joint, product):
        joint, product = self.rows(*joint), self.rows(*product)
        n = len(product)
        both = torch.cat([joint[:n], product])
        target = torch.cat([torch.tensor([[1.0, 0.0]]).repeat(n, 1), torch.tensor([[0.0, 1.0]]).repeat(n, 1)])
        bce = F.binary_cross_entropy(self.classifier(both), target)
        g = self.classifier(both)[:, 0]  # the same rows once more
        log_ratio = torch.log(g / (1 - g + 1e-6))
        cmi = 1 + (log_ratio[:n].sum() - log_ratio[n:].sum()) / (2 * n)
        return cmi, bce


def knn_product(bank_x, bank_y, bank_z, batch_size, k, query=None):
    """Product rows [m·k, d] by scikit-learn on the host, as numpy arrays copied from the bank at every call."""
    x, y, z = (v.detach().cpu().numpy() for v in (bank_x, bank_y, bank_z))
    n = len(z)
    m = batch_size // k
    query = np.random.choice(range(n), size=m, replace=False).tolist() if query is None else list(query)
    rest_x = np.array([row for i, row in enumerate(x) if i not in query])
    rest_z = np.array([row for i, row in enumerate(z) if i not in query])
    neighbours = NearestNeighbors(n_neighbors=k).fit(rest_z)
    prod_x, prod_y, prod_z = [], [], []
    for i in query:
        _, nearest = neighbours.kneighbors(z[i].reshape(1, -1))
        for j in nearest[0]:
            prod_x.append(rest_x[j])
            prod_y.append(y[i])
            prod_z.append(z[i])
    rows = [torch.from_numpy(np.stack(v)) for v in (prod_x, prod_y, prod_z)]
    widest = max(v.shape[1] for v in rows)
    return tuple(v.repeat(1, widest // v.shape[1]) for v in rows)


# -- the model -------------------------------------------------------------------------------------


class MIMRL(nn.Module):
    """Text encoder, two sequence encoders, CubeMLP, head and eleven estimators, under the published parameter names."""

    def __init__(self, c: SimpleNamespace, text_encoder: nn.Module):
        super().__init__()
        self.c, d = c, c.d_common
        self.bertmodel = text_encoder
        self.W_t = nn.Linear(c.d_in[0], d, bias=False)
        for m, width in (("a", c.d_in[1]), ("v", c.d_in[2])):
            if c.encoder == "conv":
                setattr(self, f"conv_{m}", nn.Conv1d(width, d, 3, padding=1))
            else:
                kind, layers = (nn.GRU, 2) if c.encoder == "gru" else (nn.LSTM, 1)
                setattr(self, f"rnn_{m}", kind(width, d, num_layers=layers, bidirectional=True, batch_first=True))
            setattr(self, f"ln_{m}", nn.LayerNorm(d, eps=1e-6))
        for name, p in self.named_parameters():
            if name.startswith("rnn_") and "weight_hh" in name:
                nn.init.orthogonal_(p)
        d_in = [c.time_len, 3, d]
        self.mlp_encoder = CubeMLP(d_in, c.d_hiddens, c.d_outs, c.res_project, c.activate, c.bias, c.ln_first)
        time, modalities, width = c.d_outs[-1]
        width *= (modalities if c.compose_k == "cat" else 1) * (time if c.compose_t == "cat" else 1)
        self.classifier = nn.Sequential(nn.Linear(width, 1))
        self.dropout = nn.ModuleList(nn.Dropout(p) for p in getattr(c, "dropout", [0.0] * 4)[:3])
        dims = {"f": width, "t": d, "a": d, "v": d}
        for pair in MI_PAIRS:
            x, y = pair.split("_")
            setattr(self, f"vmi_estimator_{pair}", MIEstimator(dims[x], dims[y], c))
        for triple in CMI_TRIPLES:
            setattr(self, f"vcmi_estimator_{triple}", CMIEstimator(c))

    def encode(self, x, m):
        if self.c.encoder == "conv":
            h = getattr(self, f"conv_{m}")(x.transpose(1, 2)).transpose(1, 2)
        else:
            length = (x.abs().sum(-1) != 0).sum(1).clamp(min=1).cpu()
            packed = pack_padded_sequence(x, length, batch_first=True, enforce_sorted=False)
            h, _ = pad_packed_sequence(getattr(self, f"rnn_{m}")(packed)[0], batch_first=True, total_length=x.shape[1])
            forward, backward = h.chunk(2, dim=-1)
            h = forward + backward
        return F.relu(getattr(self, f"ln_{m}")(h))

    @staticmethod
    def compose(x, how, axis):
        if how == "cat":
            return x.flatten(axis, axis + 1)
        return x.mean(axis) if how == "mean" else x.sum(axis)

    def forward(self, input_ids, attention_mask, audio, vision):
        t = self.W_t(self.bertmodel(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state)
        parts = [
            drop(p)
            for drop, p in zip(self.dropout, (t, self.encode(audio, "a"), self.encode(vision, "v")), strict=True)
        ]
        features = {name: p.mean(1) for name, p in zip("TAV", parts, strict=True)}
        x = torch.stack([F.pad(p, (0, 0, 0, self.c.time_len - p.shape[1])) for p in parts], dim=2)
        x = self.mlp_encoder(x)
        x = x.flatten(2, 3) if self.c.compose_k == "cat" else self.compose(x, self.c.compose_k, 2)
        f = self.compose(x, self.c.compose_t, 1)
        features["F"] = f
        return self.classifier(f), features

    def estimate(self, features, label, products):
        """All eleven estimators: values and losses in the published order."""
        rows = features | {"C": label}
        values, losses = [], []
        for pair in MI_PAIRS:
            x, y = pair.upper().split("_")
            value, loss = getattr(self, f"vmi_estimator_{pair}")(rows[x], rows[y])
            values.append(value)
            losses.append(loss)
        for triple in CMI_TRIPLES:
            x, y, z = triple[0].upper(), triple[1].upper(), triple[3].upper()
            value, loss = getattr(self, f"vcmi_estimator_{triple}")((rows[x], rows[y], rows[z]), products[triple])
            values.append(value)
            losses.append(loss)
        return values, losses

    def draw_products(self, bank, batch_size):
        products = {}
        for triple in CMI_TRIPLES:
            x, y, z = triple[0].upper(), triple[1].upper(), triple[3].upper()
            products[triple] = knn_product(bank[x], bank[y], bank[z], batch_size, self.c.k_neighbor)
        return products


def information_terms(values):
    """The eight derived terms from the eleven values."""
    ft, fa, fv, ta, tv, ac_t, ta_c, vc_t, tv_c, tc_a, tc_v = values
    return [ft, fa, fv, ta + tv, tc_a + tc_v - ta_c - tv_c, ac_t - ta_c, vc_t - tv_c, ta_c + tv_c]


class Trainer:
    """The two-stage loop over a list of batches, each a dict of input_ids, attention_mask, audio, vision, label."""

    def __init__(self, model, lr=1e-3, text_rate=0.05, clip=1.5, c2=0.01, stage1_n=2, main=None, estimators=None):
        self.model, self.clip, self.c2, self.stage1_n, self.bank = model, clip, c2, stage1_n, None
        named = dict(model.named_parameters())
        estimator = [p for n, p in named.items() if "vmi_estimator" in n or "vcmi_estimator" in n]
        text = [p for n, p in named.items() if n.startswith("bertmodel")]
        rest = [p for n, p in named.items() if "mi_estimator" not in n and not n.startswith("bertmodel")]
        self.main = main or torch.optim.Adam([{"params": rest}, {"params": text, "lr": lr * text_rate}], lr=lr)
        self.estimators = estimators or torch.optim.Adam(estimator, lr=lr)

    def forward(self, batch):
        return self.model(batch["input_ids"], batch["attention_mask"], batch["audio"], batch["vision"])

    def update(self, loss, optimizer):
        self.model.zero_grad()
        loss.backward()
        nn.utils.clip_grad_value_([p for p in self.model.parameters() if p.grad is not None], self.clip)
        optimizer.step()

    def stage1(self, batch, products):
        prediction, features = self.forward(batch)
        values, losses = self.model.estimate(features, batch["label"], products)
        total = sum(losses)
        self.update(total, self.estimators)
        return SimpleNamespace(prediction=prediction, features=features, values=values, losses=losses, total=total)

    def stage2(self, batch, products):
        prediction, features = self.forward(batch)
        total = (prediction - batch["label"]).abs().mean()
        values, losses = [], []
        if products is not None:
            values = information_terms(self.model.estimate(features, batch["label"], products)[0])
            losses = [-v for v in values]
            total = total + self.c2 * sum(losses)
        self.update(total, self.main)
        return SimpleNamespace(prediction=prediction, features=features, values=values, losses=losses, total=total)

    def epoch(self, batches):
        """One epoch: stage 1 `stage1_n` times where a bank exists, then stage 2. Returns the mean stage-2 loss."""
        self.model.train()
        if self.bank is not None:
            for _ in range(self.stage1_n):
                for batch in batches:
                    self.stage1(batch, self.model.draw_products(self.bank, len(batch["label"])))
        rows, total = [], 0.0
        for batch in batches:
            products = self.model.draw_products(self.bank, len(batch["label"])) if self.bank is not None else None
            output = self.stage2(batch, products)
            rows.append(output.features | {"C": batch["label"]})
            total += output.total.item() * len(batch["label"])
        self.bank = {name: torch.cat([r[name] for r in rows]) for name in rows[0]}
        return total / sum(len(b["label"]) for b in batches)


def settings(**changes) -> SimpleNamespace:
    """The flagship settings with changes."""
    return SimpleNamespace(**(copy.deepcopy(FLAGSHIP) | changes))
