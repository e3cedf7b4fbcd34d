"""Pictures of what a run did, drawn from its folder alone."""
