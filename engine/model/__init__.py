"""Models and their parts: encoders, fusion encoders, critics, and the estimators of information terms."""
