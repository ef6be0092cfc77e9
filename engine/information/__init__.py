"""Information of samples: `estimate_mi`, `estimate_cmi` and the `Estimate` they return."""
