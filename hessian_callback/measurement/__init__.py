"""One measurement without Lightning: from a problem to a `Measurement`."""
