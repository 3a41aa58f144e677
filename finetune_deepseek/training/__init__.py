"""The one training path: what a task supplies, the flags, the run, Trainer, loss, schedule and card."""
