"""Evidence put into words: what a writer may see, and whether what it wrote is grounded in it."""
