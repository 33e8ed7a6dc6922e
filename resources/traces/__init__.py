"""Public traces: reading their files as a stream, and importing them into a warehouse of their own."""
