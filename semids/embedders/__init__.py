"""Embedders: each module here is a member of the family, found by its presence."""
