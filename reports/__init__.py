"""Pages that say how good a run is, how sure, and where it fails: report.py writes them."""
