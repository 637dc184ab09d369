"""Programs for those who work on ff_fast."""
