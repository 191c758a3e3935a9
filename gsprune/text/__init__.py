"""Texts: names and their patterns, untrusted text made safe to show, secrets redacted, nested data."""
