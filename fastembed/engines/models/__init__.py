"""The models: a spec to a `Backbone` with its weights (zoo.py), one file per kind beside it."""
