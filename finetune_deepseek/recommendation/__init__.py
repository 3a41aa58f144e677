"""Recommendation: four tasks, the scores and baselines they share, and the models that are served."""
