"""The plain language model: trained on text and conversations, and put to use."""
