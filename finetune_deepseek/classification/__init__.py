"""Classification: one label, several labels or a number for a text."""
