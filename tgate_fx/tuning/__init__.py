"""Measuring what a gate costs and gains on a pipeline of one's own."""
