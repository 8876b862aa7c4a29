"""An evaluation sent to a cluster as a Ray job: its package, its environment variables, its log."""
