"""What is learned from rows of features and logits: mergeable statistics, percentiles, functions of logits.

Array in, array out; may import columns only.
"""
