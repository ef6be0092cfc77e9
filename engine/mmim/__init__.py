"""A model after MMIM (Han, Chen and Poria, EMNLP 2021): fusion led by text, held by mutual information terms."""
