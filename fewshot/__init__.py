"""The experiment: data, protocol, training loop, metrics, run folders. Knows no method by name."""
