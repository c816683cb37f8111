"""Where assistant turns, words and contents are in the tokens of an example."""
