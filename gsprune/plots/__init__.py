"""Pictures of a run, of a sweep, of an audit and of a sensitivity scan."""
