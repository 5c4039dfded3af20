"""One's own rules of a safety map, and changes of a map by hand."""
