"""Prefect tasks: adapters from the stages of `semids` to cached, retried, observed work."""
