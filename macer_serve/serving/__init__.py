"""Serving on Ray: an ingress that drives certifications, and stateless voters."""
