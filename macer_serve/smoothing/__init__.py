"""The mathematics of randomized smoothing: no torch, no Ray, no clock."""
