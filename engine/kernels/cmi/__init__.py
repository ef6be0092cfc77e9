"""Conditional mutual information from the logits of a classifier of joint against product rows."""

from engine.kernels.cmi.op import CMIOutput, classifier_logits, cmi
from engine.kernels.cmi.reference import LOGIT_LIMIT, READINGS, classifier_loss, cmi_values

__all__ = ["LOGIT_LIMIT", "READINGS", "CMIOutput", "classifier_logits", "classifier_loss", "cmi", "cmi_values"]
