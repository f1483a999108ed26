"""TOML that users write: job files and target profiles."""
