"""Insights: the question to Groq, the writer that decides who writes, and what it remembers."""
