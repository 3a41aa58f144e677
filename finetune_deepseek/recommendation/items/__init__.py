"""Items and histories: reading them, their texts, features, codes and vectors, and the search among them."""
