"""The two-stage step: one training step of both stages, its batches, its passes over an epoch, and its CUDA graphs.

`two_stage` holds the class. The other modules are what it is made of:

- a batch: `batches` reads inputs, `outputs` reads what a model returns, `checks` refuses what does not fit
- a move: `updates` clips and moves the optimisers, `averages` keeps sums and averaged weights, `finite` and
  `finite_flags` find losses that are no numbers, `state` saves it all
- a pass: `epoch` runs both stages, `passes` goes over a loader, `bank` and `recent` keep features, `position` says how
  far a pass is
- on a GPU: `static` has the stages as functions over fixed buffers, `graphs` and `graph_state` capture and replay
  them, `compiled` compiles regions of a model
"""

from engine.step.two_stage import GraphMode, StageOneFeatures, StepOutput, TwoStageStep

__all__ = ["GraphMode", "StageOneFeatures", "StepOutput", "TwoStageStep"]
