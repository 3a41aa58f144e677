"""Reading files and data sets, looking for faults in them, changing texts, and writing files whole or not at all."""
