"""Audits: what can be said of a model, an optimizer, a data type or a batch before a step goes wrong."""
