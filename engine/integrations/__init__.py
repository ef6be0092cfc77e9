"""Parts for training loops of other projects. Each module imports its project only when the module is imported."""
