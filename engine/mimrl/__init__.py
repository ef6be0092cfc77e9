"""MIMRL, the first task: multimodal sentiment analysis with mutual-information-based disentangled representations."""
