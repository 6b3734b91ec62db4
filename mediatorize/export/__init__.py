"""Exports: a bundle as files that other tools load."""
