"""Which weights learn and how: adapters, frozen groups, Muon, the mean of checkpoints."""
