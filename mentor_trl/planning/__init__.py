"""Whether a run fits together and into its machine, before anything large is loaded."""
