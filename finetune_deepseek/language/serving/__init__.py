"""A language model in use: prompts continued in batches, and a conversation in the terminal."""
