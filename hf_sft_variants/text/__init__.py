"""Where the assistant's turns and single words are in the tokens of an example."""
