"""Translation: the task, what asks a model, back-translation, and the embedded corpus."""
