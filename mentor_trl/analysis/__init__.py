"""What runs and samples look like: training dynamics, reasoning words, pass@k, tables, and rollouts token by token."""
