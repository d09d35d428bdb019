"""A page that shows a run, or several beside each other: one HTML file that needs no network."""
