"""Synthetic images: caption a real image, repaint another, keep those that CLIP recognises."""
