"""What the demo shows: recordings of real engines, served over loopback HTTP."""
