"""Sashimi: raw-audio state-space models, trained and sampled on many GPUs."""
