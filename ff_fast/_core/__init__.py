"""What is decided, without I/O: checked arguments, steps, writers, readers, workers. Both shells drive it."""
