"""The embedded engine: target, drafter, caches, and the process that runs them."""
