"""Groundswell under Ray Train; the only room that imports ray."""
