"""The Textual app. Nothing in here imports torch."""
