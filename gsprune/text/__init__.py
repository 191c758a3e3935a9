"""Texts: names and their patterns, what a stranger's text may look like when it is shown, what no record may hold."""
