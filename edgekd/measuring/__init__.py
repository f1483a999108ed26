"""Latency as launches on the device tell it: limits of validity, screens, verdict sessions."""
