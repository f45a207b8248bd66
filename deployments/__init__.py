"""Where and when flows run: served deployments and committed configurations."""
