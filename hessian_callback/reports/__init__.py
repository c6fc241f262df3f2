"""Run folders as HTML pages and CSV files."""
