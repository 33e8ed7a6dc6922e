"""The fleet report as a document, before and after it becomes HTML, markdown or a terminal's text."""
