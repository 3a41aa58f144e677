"""Images: one label for each, by a stem before the trunk and a head behind it."""
