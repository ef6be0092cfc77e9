"""Joint Gaussian latents of text, audio, vision and label, whose (conditional) mutual information is closed-form.

Every latent is a linear map of independent N(0, 1) sources:

    text    T0 = a s + b u_T   valence     T1 = c r + d n_1   verbosity    T2 = n_2   topic
    audio   A0 = a s + b n_3   tone        A1 = c r + d n_4   arousal      A2 = u_A   sarcasm
    vision  V0 = a s + b n_5   expression  V1 = c r + d n_6   motion       V2 = u_V   smile
    label   C  = (w_s s + w_T u_T + w_A u_A + w_V u_V + w_n n_7) / ||w||

    a² + b² = c² + d² = 1

s is what the modalities share about the label; r what they share without the label hearing of it; u_T, u_A, u_V what
each alone knows of it (w_A < 0: a unit of sarcasm lowers the label by a known amount, whatever the words say); topic
tells nothing. The label adds up shared and specific parts, so knowing it makes the modalities explain each other away:
that is the complementary information I(T;A|C), I(T;V|C). All of it follows from one covariance matrix.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from engine.errors import ConfigError

INDEX = {"T": [0, 1, 2], "A": [3, 4, 5], "V": [6, 7, 8], "C": [9]}

MI_TERMS = ("I(T;A)", "I(T;V)")
CMI_TERMS = ("I(A;C|T)", "I(T;A|C)", "I(V;C|T)", "I(T;V|C)", "I(T;C|A)", "I(T;C|V)")


@dataclass(frozen=True)
class LatentModel:
    """Parameters of the covariance model.

    Attributes:
        shared: a², the share of valence, tone and expression that is s, in [0, 1).
        arousal: c², the share of verbosity, arousal and motion that is r, in [0, 1).
        label: weights w of s, u_T, u_A, u_V and of the label's own noise; scaled to unit variance. The noise
            must not be 0.
    """

    shared: float = 0.6
    arousal: float = 0.5
    label: tuple[float, float, float, float, float] = (0.5, 0.6, -0.5, 0.4, 0.2)

    def loadings(self) -> np.ndarray:
        """float64 [10, 12], rows T0-2, A0-2, V0-2, C; columns s, r, u_T, u_A, u_V, n_1 .. n_7.

        Raises:
            ConfigError: a share outside [0, 1) or a label without noise, with which information would be infinite.
        """
        if not (0 <= self.shared < 1 and 0 <= self.arousal < 1 and self.label[4] != 0):
            raise ConfigError(
                "LatentModel",
                f"shared={self.shared}, arousal={self.arousal}, label noise={self.label[4]}",
                "shares in [0, 1) and a label with noise",
                "Change them, because some information would be infinite.",
            )
        a, b, c, d = np.sqrt([self.shared, 1 - self.shared, self.arousal, 1 - self.arousal])
        rows = np.zeros((10, 12))
        s, r, u_t, u_a, u_v, n1, n2, n3, n4, n5, n6, n7 = range(12)
        rows[0, [s, u_t]], rows[1, [r, n1]], rows[2, n2] = (a, b), (c, d), 1
        rows[3, [s, n3]], rows[4, [r, n4]], rows[5, u_a] = (a, b), (c, d), 1
        rows[6, [s, n5]], rows[7, [r, n6]], rows[8, u_v] = (a, b), (c, d), 1
        rows[9, [s, u_t, u_a, u_v, n7]] = np.array(self.label) / np.linalg.norm(self.label)
        return rows

    def covariance(self) -> np.ndarray:
        """float64 [10, 10], unit diagonal, order T0-2, A0-2, V0-2, C."""
        loadings = self.loadings()
        return loadings @ loadings.T

    def sample(self, n: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """`n` independent draws: {"T", "A", "V": float64 [n, 3], "C": float64 [n, 1]}."""
        joint = rng.standard_normal((n, 12)) @ self.loadings().T
        return {name: joint[:, columns] for name, columns in INDEX.items()}

    def expected_label(self, latents: dict[str, np.ndarray], given: str) -> np.ndarray:
        """E[C | the modalities named in `given`, e.g. "TAV"], float64 [n]. Linear, as everything is Gaussian."""
        sigma = self.covariance()
        known = [i for name in given for i in INDEX[name]]
        weights = np.linalg.solve(sigma[np.ix_(known, known)], sigma[known, 9])
        return np.concatenate([latents[name] for name in given], axis=1) @ weights


def conditional_information(sigma: np.ndarray, x: list[int], y: list[int], z: list[int] | None = None) -> float:
    """I(X;Y|Z) in nats of jointly Gaussian variables with covariance `sigma`, given the columns of each.

    .5 [logdet S_XZ + logdet S_YZ - logdet S_Z - logdet S_XYZ]; without `z`, I(X;Y).
    """
    z = z or []

    def logdet(columns: list[int]) -> float:
        return float(np.linalg.slogdet(sigma[np.ix_(columns, columns)])[1]) if columns else 0.0

    return 0.5 * (logdet(x + z) + logdet(y + z) - logdet(z) - logdet(x + y + z))


def split_name(name: str) -> tuple[str, str, str]:
    """ "I(A;C|T)" -> ("A", "C", "T"); "I(T;A)" -> ("T", "A", "")."""
    pair, _, given = name[2:-1].partition("|")
    x, y = pair.split(";")
    return x, y, given


def true_information(params: LatentModel | None = None) -> dict[str, float]:
    """Every estimator's and every derived term's true value for the raw latents, in nats.

    Keys: the two MI and six CMI terms that need no fused feature, then inv, spec_t, spec_a, spec_v, comp.
    """
    sigma = (params or LatentModel()).covariance()
    true = {}
    for name in MI_TERMS + CMI_TERMS:
        x, y, given = split_name(name)
        true[name] = conditional_information(sigma, INDEX[x], INDEX[y], INDEX[given] if given else None)
    return true | derived_terms(true)


def derived_terms(values: dict[str, float]) -> dict[str, float]:
    """The invariant, specific and complementary terms from the values of the eight estimators (nats)."""
    i = values
    return {
        "inv": i["I(T;A)"] + i["I(T;V)"],
        "spec_t": i["I(T;C|A)"] + i["I(T;C|V)"] - i["I(T;A|C)"] - i["I(T;V|C)"],
        "spec_a": i["I(A;C|T)"] - i["I(T;A|C)"],
        "spec_v": i["I(V;C|T)"] - i["I(T;V|C)"],
        "comp": i["I(T;A|C)"] + i["I(T;V|C)"],
    }
