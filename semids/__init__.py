"""Turn a catalogue of items into semantic IDs: short code tuples whose prefixes carry meaning."""
