"""Multiply-adds and parameters of schedules, counted without weights."""
