"""Fine-tuning on conversations: layouts, checks, masks of what is trained, replies beside references."""
