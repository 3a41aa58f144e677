"""The stages of a run, in the order of the files' use: prepare, build, train, score, write, show (../run.py)."""
