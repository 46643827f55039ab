"""Compiled code for CPUs: generation by the sample, and the state space over whole signals. PyTorch has both too."""
