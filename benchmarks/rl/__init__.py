"""Rollouts and exact mode."""
