"""A finished run in MLflow: what is said (content) and how it gets there (tracking)."""
