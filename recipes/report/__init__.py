"""A report of records: its tables, plots, page and model card."""
