"""What the trainer needs around TRL: metrics, tables, records and checkpoints of a rollout batch."""
