"""Images: where they come from, how they are prepared, and sets of them on disk."""
