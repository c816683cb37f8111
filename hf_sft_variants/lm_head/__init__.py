"""Log-probabilities of labelled positions, computed in tiles of the vocabulary."""
