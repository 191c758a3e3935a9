"""Reference networks and data sets of the application."""
