"""Training of base classifiers for smoothing: recipes, methods, and a loop that does not depend on the method.

The folder is `training/` at the top of the repository. It is imported as `macer_serve.training`, through a link in
`macer_serve/`; a wheel holds its files there. A top-level package `training` would clash with the folders of that name
that users have.
"""
