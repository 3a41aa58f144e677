"""Models made small: experts or layers left out, weights set to 0, numbers of fewer bits; scored before and after."""
