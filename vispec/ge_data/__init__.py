"""Training data: conversations and answers with the target's features, one file a sample."""
