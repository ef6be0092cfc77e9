"""Declare which information terms a model's features should have, and get the losses of two-stage training for them.

    from engine import CMI, MI, Objective

    objective = Objective(
        [0.1 * MI("Z", "Y"), -0.1 * CMI("Z", "S", given="Y").named("leak")],
        dims={"Z": 64, "Y": 8, "S": 1},
    )

`terms` has the expressions, `expressions` reads and writes them as text, `objective` has the objective itself, and
`readings` says when an estimate is not to be trusted.
"""

from typing import TYPE_CHECKING

from engine.lazy import lazy_names

_HOME = {
    "CMI": "engine.objective.terms",
    "MI": "engine.objective.terms",
    "Expression": "engine.objective.terms",
    "Sums": "engine.objective.terms",
    "Term": "engine.objective.terms",
    "Objective": "engine.objective.objective",
    "ObjectiveOutput": "engine.objective.output",
    "Rows": "engine.objective.objective",
    "without_features": "engine.objective.terms",
    "default_estimator": "engine.model.default",
    "expression_text": "engine.objective.expressions",
    "parse_expression": "engine.objective.expressions",
}

__all__ = [*_HOME]

if TYPE_CHECKING:
    from engine.model.default import default_estimator as default_estimator
    from engine.objective.expressions import expression_text as expression_text
    from engine.objective.expressions import parse_expression as parse_expression
    from engine.objective.objective import Objective as Objective
    from engine.objective.objective import Rows as Rows
    from engine.objective.output import ObjectiveOutput as ObjectiveOutput
    from engine.objective.terms import CMI as CMI
    from engine.objective.terms import MI as MI
    from engine.objective.terms import Expression as Expression
    from engine.objective.terms import Sums as Sums
    from engine.objective.terms import Term as Term
    from engine.objective.terms import without_features as without_features
else:
    __getattr__, __dir__ = lazy_names(__name__, _HOME)
