"""Where work runs: Ray, and what is asked of it; attempts, costs, and jobs sent to another cluster.

May import workspace and what lies below it; never network, data or stages.
"""
