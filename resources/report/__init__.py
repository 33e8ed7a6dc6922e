"""The fleet report: fetching what it is made of, and writing its file."""
