"""Runs as jobs of a Ray cluster: what ``groundswell submit`` and its sisters add to Ray Jobs."""
