"""Constraints: which texts a site may hold."""
