"""Training of draft heads from stored samples."""
