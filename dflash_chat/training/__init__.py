"""Training of the default pair's drafter."""
