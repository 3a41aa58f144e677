"""Question answering: answers pointed at in a passage or written, and found in a folder of texts."""
