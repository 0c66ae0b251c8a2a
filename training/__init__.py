"""Training of base classifiers for smoothing: recipes, methods, and a loop that knows nothing of methods."""
