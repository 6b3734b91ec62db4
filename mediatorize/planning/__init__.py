"""Finds plans: few model calls, with fitted times and weights. Works on a `Denoiser`; nothing here knows a network."""
