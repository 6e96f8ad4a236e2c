"""Deployment files, and the recipe of the embedded default model."""
