"""Programs for developers of ff_fast."""
