"""Contrastive losses beyond one positive among all keys: several positives, labels, masks, queues, sigmoid loss."""
