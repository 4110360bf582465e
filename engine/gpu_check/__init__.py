"""Proof of a graphics card: twelve numbered checks of all that runs on it. ``scripts/gpu_check.py`` runs them."""
