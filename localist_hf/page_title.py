"""The title of the page on which attention is read, and of the Space that shows it."""

TITLE = "Where a language model looks"
