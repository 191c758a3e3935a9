"""Partners, one file each."""
