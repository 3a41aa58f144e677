"""Command lines to arguments, before anything heavy is imported: runs.py of training, verbs.py of everything else."""
