"""The pages of report.py: how accurate a run is, how confident, and where it fails."""
