"""The verbs of the command line: their flags, what they read, what they print."""
