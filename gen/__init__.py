"""Synthetic images: caption one real picture, repaint another, keep what CLIP recognises."""
