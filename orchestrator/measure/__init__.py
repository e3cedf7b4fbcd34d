"""Gradients to the sums that the estimator needs."""
