"""Methods and files: a run back as a method, its learning for other software, and from it."""
