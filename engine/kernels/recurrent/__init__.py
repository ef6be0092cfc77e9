"""Bidirectional GRU and LSTM over ragged batches."""
